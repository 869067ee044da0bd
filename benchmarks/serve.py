"""What serving costs: the bare engine, one process with uvicorn, and Ray Serve, all in one run.

    python -m benchmarks.serve --step 0.005 0.02

The fake engine answers with 128 tokens at a given seconds a step. `two deployments` is the same server on
Ray, asked for its second model: those streams pass through a handle. `direct ingress` is an experimental way
of Ray's. Overload: ten times the requests that are admitted, for --overload seconds. The client is this
process, on the same cores; `--step` without a number leaves out all but the overload.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from urllib.parse import urlsplit

from benchmarks.machine import describe_machine
from serve.dialogues import Call, ModelInfo
from serve.model import ServedModel
from sharegpt4v.dialogue import Request, SamplingParams, SquareImages, Turn
from sharegpt4v.engine.fake import FakeEngine, FakeOptions

TOKENS, SLOTS = 128, 64
_LOOP_TOKENS = 280  # of the fake engine's longest answer, which it paces


@dataclass(frozen=True, slots=True)
class Timing:
    """status: of HTTP. first, whole: seconds to the first text and to the end. gaps: between chunks."""

    status: int
    first: float
    whole: float
    gaps: tuple[float, ...] = ()


Ask = Callable[[], Awaitable[Timing]]


async def load(ask: Ask, clients: int, rounds: int) -> tuple[list[Timing], float]:
    """Has clients ask at the same time, each so many times; returns the answers and the seconds."""

    async def ask_on() -> list[Timing]:
        return [await ask() for _ in range(rounds)]

    start = time.perf_counter()
    found = await asyncio.gather(*(ask_on() for _ in range(clients)))
    return [one for several in found for one in several], time.perf_counter() - start


def over_http(address: str, model: str) -> Ask:
    """Makes a client that costs little: one connection a request, and no parsing but for a search."""
    there = urlsplit(address)
    message = {"role": "user", "content": "hello"}
    body = {"model": model, "messages": [message], "max_tokens": TOKENS, "stream": True}
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"

    async def ask() -> Timing:
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(there.hostname, there.port)
        writer.write(head.encode() + content)
        status = int((await reader.readline()).split()[1])
        times: list[float] = []
        while part := await reader.read(65536):
            if b'"content":"' in part and b'"content":""' not in part:
                times.append(time.perf_counter())
        writer.close()
        end = time.perf_counter()
        gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
        return Timing(status, (times[0] if times else end) - start, end - start, gaps)

    return ask


def bare(step: float) -> tuple[FakeEngine, Ask]:
    engine = FakeEngine(
        FakeOptions(requests_at_once=SLOTS, seconds_per_request=step * _LOOP_TOKENS, faults={"loop": "."})
    )
    model = ServedModel(engine, ModelInfo("fake", "chat", SquareImages(96, "pad")))
    request = Request("a", (Turn("user", "hello"),), SamplingParams(max_new_tokens=TOKENS), stream=True)

    async def ask() -> Timing:
        start = time.perf_counter()
        times = [
            time.perf_counter()
            async for event in model.answer(Call(request))
            if isinstance(event, str) and event
        ]
        gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
        return Timing(200, times[0] - start, time.perf_counter() - start, gaps)

    return engine, ask


@contextmanager
def served(step: float, *flags: str, in_flight: int = 1000, **variables: str) -> Iterator[tuple[str, int]]:
    """Yields the address and the process id of `sharegpt4v serve`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "cluster.cli", "serve", "--engine", "fake", "--port", port, *flags]
    command += ["--slots", str(SLOTS), "--fake.seconds-per-request", str(step * _LOOP_TOKENS)]
    command += [
        "--fake.faults",
        '{"loop": "."}',
        "--limits.in-flight",
        str(in_flight),
        "--drain-seconds",
        "1",
    ]
    environment = os.environ | variables
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            found = re.match(r"ready: (http://\S+)/v1", server.stdout.readline())
            assert found, "the server did not start"
            yield found[1], server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def measure(name: str, ask: Ask, clients: int = 32) -> None:
    """Prints time to the first token alone and under load, tokens a second, and the gaps between chunks."""

    async def run() -> None:
        await load(ask, 1, 2)
        alone, _ = await load(ask, 1, 10)
        answers, seconds = await load(ask, clients, 3)
        assert {one.status for one in [*alone, *answers]} == {200}
        gap = quantiles([gap for one in answers for gap in one.gaps], n=100)[98]
        print(
            f"{name:28} first token {median(one.first for one in alone) * 1e3:6.1f} ms alone, "
            f"{median(one.first for one in answers) * 1e3:6.1f} ms of {clients}; "
            f"{len(answers) * TOKENS / seconds:6.0f} tokens/s; p99 between chunks {gap * 1e3:5.1f} ms",
            flush=True,
        )

    asyncio.run(run())


def overload(name: str, ask: Ask, admitted: int, seconds: float, pid: int) -> None:
    """Prints what ten times the admitted clients see, beside the admitted number alone."""

    async def run() -> None:
        calm, _ = await load(ask, admitted, 2)
        before, end = _memory(pid), time.perf_counter() + seconds
        answers: list[Timing] = []

        async def ask_on() -> None:
            while time.perf_counter() < end:
                answers.append(await ask())
                if answers[-1].status == 429:
                    await asyncio.sleep(1)  # as Retry-After says

        await asyncio.gather(*(ask_on() for _ in range(10 * admitted)))
        good = [one.first for one in answers if one.status == 200]
        busy = [one.whole for one in answers if one.status == 429]
        others = len(answers) - len(good) - len(busy)
        alone = median(one.first for one in calm)
        late = quantiles(busy, n=100)[98]
        print(
            f"{name:28} overload: {len(good)} answered, first token {median(good) * 1e3:.0f} ms "
            f"({alone * 1e3:.0f} without); {len(busy)} times 429 after {median(busy) * 1e3:.0f} ms, "
            f"p99 {late * 1e3:.0f}; other statuses {others}; "
            f"memory of the command {before:.0f} to {_memory(pid):.0f} MB",
            flush=True,
        )

    asyncio.run(run())


def _memory(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        found = re.search(r"VmRSS:\s+(\d+)", file.read())
    return int(found[1]) / 1e3 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", type=float, nargs="*", default=[0.005, 0.02], help="seconds a step")
    parser.add_argument("--overload", type=float, default=60, help="seconds of overload; 0: none")
    parser.add_argument("--direct", action="store_true", help="try Ray's direct ingress as well")
    arguments = parser.parse_args()
    print(describe_machine())
    for step in arguments.step:
        print(f"steps of {step * 1e3:g} ms, {TOKENS} tokens an answer")
        engine, ask = bare(step)
        measure("bare engine", ask)
        engine.close()
        with served(step, "--without-ray") as (address, _):
            measure("one process", over_http(address, "fake-chat"))
        with served(step) as (address, _):
            measure("Ray, answering itself", over_http(address, "fake-chat"))
            measure("Ray, two deployments", over_http(address, "fake-captioner"))
        if arguments.direct:
            with served(step, RAY_SERVE_ENABLE_DIRECT_INGRESS="1") as (address, _):
                measure("Ray, direct ingress", over_http(address, "fake-chat"))
    if arguments.overload:
        for name, flags in (("one process", ["--without-ray"]), ("Ray, answering itself", [])):
            with served(0.005, *flags, in_flight=32) as (address, pid):
                overload(name, over_http(address, "fake-chat"), 32, arguments.overload, pid)


if __name__ == "__main__":
    main()
