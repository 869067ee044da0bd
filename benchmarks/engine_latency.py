"""What users of the torch engine wait for: rounds of a dialogue, and streams while long prompts arrive.

    python -m benchmarks.engine_latency

A LLaVA-shaped model of 100 M parameters with 576 image tokens and random weights. First dialogues of two
rounds with an image, with and without reuse of what the first round computed; then one stream, beside which
prompts with images arrive together.
"""

import argparse
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.llava_100m import save_llava_100m
from benchmarks.machine import describe_machine
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.torch_engine import PREFILL_TOKENS, TorchEngine
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter


def ask(name: str, turns: tuple[Turn, ...], tokens: int) -> Request:
    return Request(name, turns, SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens))


def rounds(adapter: Adapter, dialogues: int, prefixes: int, threads: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token of the first and of the second rounds, one dialogue at a time."""
    first: list[float] = []
    second: list[float] = []
    pixels = np.random.default_rng(0)
    size = (adapter.image_size, adapter.image_size, 3)
    with closing(TorchEngine(adapter, "llava@0", 4, threads=threads, prefixes=prefixes)) as engine:
        for number in range(dialogues + 1):
            image = pixels.integers(0, 256, size, dtype=np.uint8)
            question = Turn("user", "What is in this picture?", (image,))
            answer = engine.submit(ask(f"{number}a", (question,), 24)).result()
            turns = (question, Turn("assistant", answer.text), Turn("user", "Where is the second one?"))
            again = engine.submit(ask(f"{number}b", turns, 24)).result()
            if number:  # the first dialogue warms up
                first.append(answer.first_token_seconds)
                second.append(again.first_token_seconds)
    return first, second


def gaps(adapter: Adapter, arrivals: int, threads: int) -> tuple[float, float, float]:
    """Seconds: longest gap of a stream while prompts arrive, its usual gap, and one part of a prefill."""
    pixels = np.random.default_rng(1)
    size = (adapter.image_size, adapter.image_size, 3)
    with closing(TorchEngine(adapter, "llava@0", 32, threads=threads)) as engine:
        question = Turn("user", "Why?", (pixels.integers(0, 256, size, dtype=np.uint8),))
        engine.submit(ask("warm", (question,), 4)).result()
        before = engine.stats()
        engine.submit(ask("one", (question,), 1)).result()
        after = engine.stats()
        parts = -(-(after.prompt_tokens - before.prompt_tokens) // PREFILL_TOKENS["cpu"])
        part = (after.prefill_seconds - before.prefill_seconds) / parts
        stream = engine.submit(replace(ask("stream", (Turn("user", "Hi"),), 600), stream=True))
        times: list[float] = []
        crowd: list[Handle] = []
        for _ in stream:
            times.append(time.perf_counter())
            if len(times) == 20:
                for number in range(arrivals):
                    image = pixels.integers(0, 256, size, dtype=np.uint8)
                    turns = (Turn("user", "What is in this picture?", (image,)),)
                    crowd.append(engine.submit(ask(f"c{number}", turns, 1)))
            if crowd and all(handle.done() for handle in crowd):
                break
        waits = [after - before for before, after in zip(times, times[1:], strict=False)]
    return max(waits[20:]), median(waits[:19]), part


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialogues", type=int, default=12)
    parser.add_argument("--arrivals", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(describe_machine())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        adapter = load_adapter(save_llava_100m(Path(folder)))
        for prefixes in (4, 0):
            first, second = (
                median(part) for part in rounds(adapter, options.dialogues, prefixes, options.threads)
            )
            print(
                f"rounds, {prefixes} dialogues kept: first token after {1e3 * first:.0f} ms in round 1, "
                f"{1e3 * second:.0f} ms in round 2: ratio {second / first:.2f} (target with reuse 0.3)",
                flush=True,
            )
        longest, usual, part = gaps(adapter, options.arrivals, options.threads)
        print(
            f"a stream while {options.arrivals} prompts with images arrive: longest gap "
            f"{1e3 * longest:.0f} ms, usual {1e3 * usual:.1f} ms; one part of a prefill {1e3 * part:.0f} ms: "
            f"ratio {longest / part:.2f} (target 3)"
        )


if __name__ == "__main__":
    main()
