"""What Ray costs the main job: `sharegpt4v caption` with an engine of no cost against two bare processes.

    python -m benchmarks.caption_overhead --rows 1200000

Both sides read each image, hash it, decode it to model size, caption it with the fake engine, pass the
gate and write Parquet. Ours also starts Ray, keeps the run folder resumable, audits, compacts and reports;
all of it is counted.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.machine import describe_machine
from pipelines.steps.captioning import Caption, CaptionRules
from pipelines.steps.decoding import Decode
from pipelines.steps.ledger import Ledger
from sharegpt4v.dialogue import SamplingParams, SquareImages
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.gate import GateRules
from sharegpt4v.images import ImageReader
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.records import PENDING

DISTINCT = 2_000
BARE_ROWS = 200_000  # the bare loop has no start-up and keeps its rate, so it need not do them all
BATCH = 512


def make_input(folder: Path, rows: int, size: int) -> Path:
    """A Parquet manifest of `rows` ids over at most 2,000 photo-like JPEGs of size x size."""
    images = folder / f"images-{size}"
    images.mkdir()
    random = np.random.default_rng(0)
    distinct = min(rows, DISTINCT)
    for index in range(distinct):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        grain = random.integers(-12, 12, (size, size, 3))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{index:05}.jpg", quality=90)
    names = pa.array([f"{index % distinct:05}.jpg" for index in range(rows)])
    ids = pa.array([f"image-{index:08}" for index in range(rows)])
    path = images / "manifest.parquet"
    pq.write_table(pa.table({"id": ids, "image": names, "source": pa.array(["coco"] * rows)}), path)
    return path


def ours(manifest: Path, out: Path, size: int) -> tuple[float, int]:
    """Wall seconds and the driver's peak resident memory in MB."""
    command = [sys.executable, "-m", "cluster.cli", "caption", "--images", str(manifest), "--out", str(out)]
    command += ["--engine", "fake", "--fake.image-side", str(size)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.2)
    assert process.stderr is not None
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}:\n{process.stderr.read()[-2000:]}")
    return time.perf_counter() - start, peak


def bare(manifest: Path, out: Path, size: int) -> float:
    """Wall seconds of the same steps in two processes without Ray."""
    out.mkdir()
    start = time.perf_counter()
    workers = [
        multiprocessing.Process(target=_bare_half, args=(manifest, out, size, half)) for half in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return time.perf_counter() - start


def _bare_half(manifest: Path, out: Path, size: int, half: int) -> None:
    ledger = Ledger(1.0)
    decode = Decode(ImageReader(str(manifest.parent)), SquareImages(size, "squash"), False, ledger)
    spec = EngineSpec("fake", "fake@0", fake=FakeOptions(image_side=size))
    rules = CaptionRules(UNIFIED_CAPTION, SamplingParams(), SamplingParams(temperature=0.7), GateRules())
    caption = Caption(spec, rules, ledger, hang_seconds=60)
    table = pq.read_table(manifest).slice(0, BARE_ROWS)
    rows = len(table) // 2
    table = table.slice(half * rows, rows if half == 0 else None)
    fixed = {"shard": pa.int32(), "row": pa.int32(), "offset": pa.int64(), "size": pa.int64()}
    for name, kind in fixed.items():
        table = table.append_column(name, pa.array(np.full(len(table), -1 if name == "size" else 0), kind))
    table = table.append_column("container", pa.array([""] * len(table))).select(PENDING.names)
    for number, start in enumerate(range(0, len(table), BATCH)):
        pq.write_table(caption(decode(table.slice(start, BATCH))), out / f"part-{half}-{number:05}.parquet")


def peak_memory(pid: int) -> int:
    """Returns the peak resident memory of a process in MB; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) // 1024


def measure(folder: Path, rows: int, size: int) -> None:
    """One line of the table: ours, memory, rerun, and the bare loop."""
    work = folder / f"{rows}-{size}"
    work.mkdir()
    manifest = make_input(work, rows, size)
    # Before and after ours: the speed of a shared machine drifts within the minutes that a run takes.
    other = bare(manifest, work / "bare before", size)
    seconds, memory = ours(manifest, work / "run", size)
    other += bare(manifest, work / "bare after", size)
    again, _ = ours(manifest, work / "run", size)
    line = f"{rows:>9,} rows of {size}x{size}: {rows / seconds:7,.0f} images/s, "
    bare_rate = 2 * min(rows, BARE_ROWS) / other
    line += f"driver {memory} MB, rerun {again:.1f} s; "
    line += f"bare {bare_rate:,.0f} images/s, ratio {rows / seconds / bare_rate:.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_200_000)
    parser.add_argument("--small-rows", type=int, default=100_000, help="the run whose memory is compared")
    parser.add_argument("--large-image-rows", type=int, default=20_000, help="rows of 256x256")
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="caption-overhead-") as folder:
        measure(Path(folder), options.small_rows, 96)
        if options.large_image_rows:
            measure(Path(folder), options.large_image_rows, 256)
        if options.rows:
            measure(Path(folder), options.rows, 96)


if __name__ == "__main__":
    main()
