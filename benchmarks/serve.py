"""What serving costs: the bare engine, one process with uvicorn, and Ray Serve, all in one run.

    python -m benchmarks.serve --step 0.005 0.02 --models 100m toy

The fake engine answers with 128 tokens at a given seconds a step. `two deployments` is the same server on
Ray, asked for its second model: those streams pass through a handle. `direct ingress` is an experimental way
of Ray's. Models: the LLaVA-shaped one of 100 M parameters with random weights, asked a text, and the toy chat
model, asked for captions of 32 images. Overload: ten times the requests that are admitted, for --overload
seconds. The client is this process, on the same cores; `--step` without a number leaves its lines out.
"""

import argparse
import asyncio
import base64
import io
import re
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.llava_100m import save_llava_100m
from benchmarks.machine import describe_machine
from benchmarks.serve_client import Ask, Timing, chat_body, in_process, load, measure, over_http, served
from serve.dialogues import ModelInfo
from serve.model import ServedModel
from serve.models import EngineOptions, load_model
from sharegpt4v.dialogue import SquareImages
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene

TOKENS, SLOTS = 128, 64
_LOOP_TOKENS = 280  # of the fake engine's longest answer, which it paces

_MODEL_SLOTS, _MODEL_CONTEXT = 32, 1024


def fake_flags(step: float, in_flight: int = 1000) -> list[str]:
    flags = ["--engine", "fake", "--slots", str(SLOTS), "--limits.in-flight", str(in_flight)]
    paced = ["--fake.seconds-per-request", str(step * _LOOP_TOKENS), "--fake.faults", '{"loop": "."}']
    return [*flags, *paced]


def measure_fake(step: float, direct: bool) -> None:
    """Prints a line for each side with the fake engine."""
    print(f"steps of {step * 1e3:g} ms, {TOKENS} tokens an answer")
    chat, captioner = ([chat_body(f"fake-{kind}", "hello", TOKENS)] for kind in ("chat", "captioner"))
    options = FakeOptions(
        requests_at_once=SLOTS, seconds_per_request=step * _LOOP_TOKENS, faults={"loop": "."}
    )
    engine = FakeEngine(options)
    measure(
        "bare engine",
        in_process(ServedModel(engine, ModelInfo("fake-chat", "chat", SquareImages(96, "pad"))), chat),
    )
    engine.close()
    flags = fake_flags(step)
    with served(*flags, "--without-ray") as (address, _):
        measure("one process", over_http(address, chat))
    with served(*flags) as (address, _):
        measure("Ray, answering itself", over_http(address, chat))
        measure("Ray, two deployments", over_http(address, captioner))
    if direct:
        with served(*flags, RAY_SERVE_ENABLE_DIRECT_INGRESS="1") as (address, _):
            measure("Ray, direct ingress", over_http(address, chat))


def measure_model(name: str, threads: int, rounds: int) -> None:
    """Prints a line for each side with a model whose engine computes with so many threads."""
    with tempfile.TemporaryDirectory() as temporary:
        model, contents = "toy", _toy_contents()
        if name == "100m":
            model, contents = str(save_llava_100m(Path(temporary) / "llava")), ["hello"]
        print(f"{name}, {_MODEL_SLOTS} slots, threads {threads}, float32")
        bodies = [chat_body("model", content, TOKENS) for content in contents]
        flags = ["--chat", model, "--chat-name", "model", "--captioner", "none", "--dtype", "float32"]
        flags += ["--slots", str(_MODEL_SLOTS), "--threads-per-replica", str(threads)]
        flags += ["--max-context", str(_MODEL_CONTEXT)]
        with served(*flags, "--without-ray") as (address, _):
            measure("one process", over_http(address, bodies), rounds=rounds)
        with served(*flags) as (address, _):
            measure("Ray, answering itself", over_http(address, bodies), rounds=rounds)
        # The last, because this process keeps some of its memory.
        options = EngineOptions(
            dtype="float32", slots=_MODEL_SLOTS, max_context=_MODEL_CONTEXT, threads=threads
        )
        bare = load_model("chat", model, options, "model")
        measure("bare engine", in_process(bare, bodies), rounds=rounds)
        bare.engine.close()


def _toy_contents() -> list[Any]:
    """Returns the parts of 32 questions, each about an image of its own."""
    contents = []
    for number in range(32):
        file = io.BytesIO()
        render(make_scene(77, number), (336, 336)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}}
        contents.append([image, {"type": "text", "text": UNIFIED_CAPTION.text}])
    return contents


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
    parser.add_argument("--models", nargs="*", default=["100m", "toy"], choices=["100m", "toy"])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="of a model's engine")
    parser.add_argument("--rounds", type=int, default=3, help="questions of each of a model's 32 clients")
    parser.add_argument("--overload", type=float, default=60, help="seconds of overload; 0: none")
    parser.add_argument("--direct", action="store_true", help="try Ray's direct ingress as well")
    arguments = parser.parse_args()
    print(describe_machine())
    for step in arguments.step:
        measure_fake(step, arguments.direct)
    for name in arguments.models:
        for threads in arguments.threads:
            measure_model(name, threads, arguments.rounds)
    if arguments.overload:
        asked = [chat_body("fake-chat", "hello", TOKENS)]
        for name, flags in (("one process", ["--without-ray"]), ("Ray, answering itself", [])):
            with served(*fake_flags(0.005, in_flight=32), *flags) as (address, pid):
                overload(name, over_http(address, asked), 32, arguments.overload, pid)


if __name__ == "__main__":
    main()
