"""Second rounds of dialogues through the API: the first token's time beside the first round's.

    python -m benchmarks.serve_dialogue

A LLaVA-shaped model of 100 M parameters with 576 image tokens and random weights, served in one process and
on Ray. Each dialogue has an image of its own; answers have one token, so the time is that of the first token.
"""

import argparse
import base64
import io
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.llava_100m import save_llava_100m
from benchmarks.machine import describe_machine
from benchmarks.serve_client import served


def picture(seed: int) -> str:
    """Returns a data URL of noise, 336 px a side."""
    pixels = np.random.default_rng(seed).integers(0, 255, (336, 336, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def seconds(address: str, messages: list[Any]) -> float:
    body = {"model": "llava", "messages": messages, "max_tokens": 1, "temperature": 0}
    start = time.perf_counter()
    httpx.post(f"{address}/chat/completions", json=body, timeout=120).raise_for_status()
    return time.perf_counter() - start


def rounds(address: str, dialogues: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of first and of second rounds; the very first dialogue warms up."""
    first: list[float] = []
    second: list[float] = []
    for number in range(dialogues + 1):
        image = {"type": "image_url", "image_url": {"url": picture(number)}}
        said: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": "red circle"}]}]
        first.append(seconds(address, said))
        said += [{"role": "assistant", "content": "blue square"}, {"role": "user", "content": "green ring"}]
        second.append(seconds(address, said))
    return first[1:], second[1:]


def measure(name: str, folder: Path, dialogues: int, *flags: str) -> None:
    """Serves the folder and prints the medians of both rounds."""
    model = ["--chat", str(folder), "--chat-name", "llava", "--captioner", "none", "--dtype", "float32"]
    with served(*model, "--slots", "4", "--threads-per-replica", "2", *flags) as (address, _):
        first, second = map(median, rounds(f"{address}/v1", dialogues))
    print(
        f"{name}: first round {first * 1e3:.0f} ms, second {second * 1e3:.0f} ms, ratio {second / first:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=8)
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        folder = save_llava_100m(Path(name) / "llava")
        measure("one process", folder, options.dialogues, "--without-ray")
        measure("on Ray", folder, options.dialogues)


if __name__ == "__main__":
    main()
