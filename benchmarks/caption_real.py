"""Real captioning on CPU: the pipeline with the toy captioner against its bare engine in one process.

    python -m benchmarks.caption_real --images 3000

Both decode the same files. Start-up is left out of both rates and printed: for the pipeline the time to
its first commit, for the bare engine the loading of the weights. The bare engine is given the thread count
it is fastest with.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import describe_machine
from pipelines.steps.decoding import Decode
from pipelines.steps.job import make_job
from pipelines.steps.ledger import Ledger
from sharegpt4v.config.base import resolve
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.engine.build import build_engine
from sharegpt4v.images import ImageReader
from sharegpt4v.toy.images import write_images


def pipeline(images: Path, out: Path) -> tuple[float, float]:
    """Images/s after the first commit, and seconds until it."""
    command = [sys.executable, "-m", "cluster.cli", "caption", "--images", str(images), "--out", str(out)]
    start = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    commits = json.loads((out / "summary.json").read_text())["commits"]
    first, last = commits[0], commits[-1]
    rows = sum(commit["rows"] for commit in commits) - first["rows"]
    return rows / (last["time"] - first["time"]), first["time"] - start


def bare(images: Path, manifest: Path, threads: int) -> tuple[float, float]:
    """Images/s of decode, submit and wait in one process, and seconds of loading."""
    config = resolve(
        CaptionConfig, CaptionConfig.presets["toy"].values, {"images": str(images), "out": "unused"}
    )
    job = make_job(config)
    start = time.perf_counter()
    engine = build_engine(replace(job.spec, threads=threads))
    loaded = time.perf_counter() - start
    decode = Decode(ImageReader(str(images)), job.images, False, Ledger(1.0))
    table = pq.read_table(manifest)
    for name in ("shard", "row"):
        table = table.append_column(name, pa.array(np.zeros(len(table), np.int32)))
    start = time.perf_counter()
    waiting = []
    for offset in range(0, len(table), job.spec.capacity):
        part = decode(table.slice(offset, job.spec.capacity))
        pixels_of_all = part["pixels"].combine_chunks().to_numpy_ndarray()
        for key, pixels in zip(part["id"].to_pylist(), pixels_of_all, strict=True):
            turns = (Turn("user", job.rules.prompt.text, (pixels,)),)
            waiting.append(engine.submit(Request(key, turns, job.rules.sampling)))
    for handle in waiting:
        handle.result()
    seconds = time.perf_counter() - start
    engine.close()
    return len(waiting) / seconds, loaded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3_000)
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="caption-real-") as folder:
        images, run = Path(folder) / "images", Path(folder) / "run"
        write_images(images, options.images, seed=1)
        rate, first = pipeline(images, run)
        sides = {
            threads: bare(images, run / "manifest" / "part-00000.parquet", threads) for threads in (1, 2)
        }
    best = max(sides, key=lambda threads: sides[threads][0])
    print(f"pipeline: {rate:.1f} images/s, first commit after {first:.1f} s")
    for threads, (speed, loaded) in sides.items():
        print(f"bare engine, {threads} threads: {speed:.1f} images/s, loaded in {loaded:.1f} s")
    print(f"ratio {rate / sides[best][0]:.2f}")


if __name__ == "__main__":
    main()
