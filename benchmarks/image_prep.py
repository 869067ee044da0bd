"""Images per second from JPEG bytes to model input, one core: the released way against ours.

    python benchmarks/image_prep.py

The released way: decode, pad to a square at full size, resize bicubically, normalise to float CHW with
transformers' CLIP processor. Ours ends in uint8 HWC at model size (the device normalises): `exact`, and
`fast` with scaled JPEG decoding. The sides take turns in rounds and the median round counts, because
other work on the machine slows all of them alike. Differences are means over pixels, in steps of 1/255.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sharegpt4v.images import PAD_COLOUR, prepare

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
MODEL_SIZE = 336
Pixels = npt.NDArray[np.float32]
PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": MODEL_SIZE}, crop_size={"height": MODEL_SIZE, "width": MODEL_SIZE}
)


def released(data: bytes) -> Pixels:
    """(3, size, size) float32, CLIP-normalised."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels: Pixels = PROCESSOR.preprocess(square, return_tensors="np")["pixel_values"][0]
    return pixels


def jpegs(width: int, height: int, count: int, seed: int) -> list[bytes]:
    """`count` JPEGs of quality 90: enlarged photographs with sensor noise, or textures."""
    random = np.random.default_rng(seed)
    photos = sorted(PHOTOS.glob("*/*.jpg"), key=lambda path: -path.stat().st_size)[:count]
    if photos:
        bases = [Image.open(photo).convert("RGB") for photo in photos]
    else:
        bases = [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(count)]
    files = []
    for base in bases:
        pixels = np.asarray(base.resize((width, height), Image.Resampling.BICUBIC))
        noisy = np.clip(pixels + random.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def race(sides: dict[str, Callable[[bytes], object]], files: list[bytes], seconds: float) -> dict[str, float]:
    """Median images/s of each side; one round runs every side once over all files."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates["released"]) < 3:
        for name, run in sides.items():
            start = time.perf_counter()
            for data in files:
                run(data)
            rates[name].append(len(files) / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def difference(files: list[bytes], fast: bool) -> float:
    """Mean absolute difference from the released result before its normalisation, in steps of 1/255."""
    mean, std = np.array(PROCESSOR.image_mean), np.array(PROCESSOR.image_std)
    errors = []
    for data in files:
        theirs = (released(data).transpose(1, 2, 0) * std + mean) * 255
        errors.append(np.abs(prepare(data, MODEL_SIZE, "pad", fast=fast).pixels - theirs).mean())
    return float(np.mean(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="per image size")
    parser.add_argument("--count", type=int, default=8, help="different images per size")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print("input:", "real photographs, enlarged, with noise" if PHOTOS.exists() else "synthetic textures")
    print(f"{'size':>10} {'KB':>5} {'side':>9} {'images/s':>9} {'speed-up':>9} {'difference':>11}")
    for width, height in ((640, 480), (1500, 2250)):
        files = jpegs(width, height, arguments.count, arguments.seed)
        sides: dict[str, Callable[[bytes], object]] = {
            "released": released,
            "exact": lambda data: prepare(data, MODEL_SIZE, "pad"),
            "fast": lambda data: prepare(data, MODEL_SIZE, "pad", fast=True),
        }
        rates = race(sides, files, arguments.seconds)
        for name, rate in rates.items():
            gap = f"{difference(files, name == 'fast'):.3f}" if name != "released" else ""
            ratio = rate / rates["released"]
            kilobytes = sum(map(len, files)) // len(files) // 1000
            print(f"{width}x{height:<5} {kilobytes:>5} {name:>9} {rate:>9.1f} {ratio:>8.2f}x {gap:>11}")


if __name__ == "__main__":
    main()
