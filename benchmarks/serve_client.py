"""What the serving benchmarks share: a server that is started and stopped, and clients that cost little."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from serve.dialogues import chat_call
from serve.limits import Limits
from serve.model import ServedModel
from serve.wire import ChatRequest
from sharegpt4v.dialogue import Completion


@dataclass(frozen=True, slots=True)
class Timing:
    """status: of HTTP. first, whole: seconds to the first text and to the end. gaps: between chunks."""

    status: int
    first: float
    whole: float
    gaps: tuple[float, ...] = ()
    tokens: int = 0


Ask = Callable[[], Awaitable[Timing]]


def chat_body(model: str, content: Any, tokens: int) -> dict[str, Any]:
    """Returns the body of a chat request that streams. content: a text, or parts."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def load(ask: Ask, clients: int, rounds: int) -> tuple[list[Timing], float]:
    """Has clients ask at the same time, each so many times; returns the answers and the seconds."""

    async def ask_on() -> list[Timing]:
        return [await ask() for _ in range(rounds)]

    start = time.perf_counter()
    found = await asyncio.gather(*(ask_on() for _ in range(clients)))
    return [one for several in found for one in several], time.perf_counter() - start


def over_http(address: str, bodies: Sequence[dict[str, Any]]) -> Ask:
    """Makes a client that costs little: one connection a request, and no parsing but for a search.

    It asks the bodies in turn.
    """
    there = urlsplit(address)
    requests = cycle([_http(body) for body in bodies])

    async def ask() -> Timing:
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(there.hostname, there.port)
        writer.write(next(requests))
        status = int((await reader.readline()).split()[1])
        times: list[float] = []
        end_of_stream = b""
        while part := await reader.read(65536):
            end_of_stream = end_of_stream[-1000:] + part
            if b'"content":"' in part and b'"content":""' not in part:
                times.append(time.perf_counter())
        writer.close()
        usage = re.search(rb'"completion_tokens": ?(\d+)', end_of_stream)
        return _timing(status, start, times, int(usage[1]) if usage else 0)

    return ask


def _http(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def in_process(model: ServedModel, bodies: Sequence[dict[str, Any]]) -> Ask:
    """Makes a client of the engine alone, in this process; the bodies are decoded before."""
    limits = Limits()
    decoded = [ChatRequest.model_validate(body) for body in bodies]
    calls = cycle([chat_call(one, model.info, limits, str(number)) for number, one in enumerate(decoded)])

    async def ask() -> Timing:
        start = time.perf_counter()
        times: list[float] = []
        tokens = 0
        async for event in model.answer(next(calls)):
            if isinstance(event, str) and event:
                times.append(time.perf_counter())
            if isinstance(event, Completion):
                tokens = event.tokens
        return _timing(200, start, times, tokens)

    return ask


def _timing(status: int, start: float, times: list[float], tokens: int) -> Timing:
    end = time.perf_counter()
    gaps = tuple(b - a for a, b in zip(times, times[1:], strict=False))
    return Timing(status, (times[0] if times else end) - start, end - start, gaps, tokens)


@contextmanager
def served(*flags: str, **variables: str) -> Iterator[tuple[str, int]]:
    """Yields the address and the process id of `sharegpt4v serve`. variables: of its environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "cluster.cli", "serve", "--port", port, "--drain-seconds", "1", *flags]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | variables,
    ) as server:
        try:
            assert server.stdout is not None
            found = re.match(r"ready: (http://\S+)/v1", server.stdout.readline())
            assert found, "the server did not start"
            yield found[1], server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def measure(name: str, ask: Ask, clients: int = 32, rounds: int = 3) -> None:
    """Prints time to the first token alone and under load, tokens a second, and the gaps between chunks."""

    async def run() -> None:
        await load(ask, 1, 2)
        alone, _ = await load(ask, 1, 10)
        answers, seconds = await load(ask, clients, rounds)
        assert {one.status for one in [*alone, *answers]} == {200}
        gap = quantiles([gap for one in answers for gap in one.gaps], n=100)[98]
        tokens = sum(one.tokens for one in answers)
        print(
            f"{name:28} first token {median(one.first for one in alone) * 1e3:6.1f} ms alone, "
            f"{median(one.first for one in answers) * 1e3:6.1f} ms of {clients}; "
            f"{tokens / seconds:6.0f} tokens/s, {tokens / len(answers):.0f} an answer; "
            f"p99 between chunks {gap * 1e3:5.1f} ms",
            flush=True,
        )

    asyncio.run(run())
