"""A large run at a real captioner's commit size, killed in the middle and resumed, on two local nodes.

    python -m benchmarks.resume_size --rows 1200000

The fake engine captions images of 96x96 with commits of 64 rows, what a captioner of 32 slots has by default.
The driver is killed with SIGKILL once half of the rows are committed; the same command then finishes the run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.caption_overhead import make_input, peak_memory
from benchmarks.machine import describe_machine
from tests.cluster.nodes import nodes
from tests.commands import command, environment

SIZE = 96  # pixels a side
COMMIT_ROWS = 64


@dataclass(frozen=True)
class Session:
    """One command: seconds until its first commit and until it ended, and its driver's peak memory in MB."""

    first_commit: float
    seconds: float
    memory: int


def files_of(outcomes: Path) -> list[int]:
    """Counts the commits in each folder below work/outcomes; a finished run has none left."""
    folders = [Path(place) for place, _, names in os.walk(outcomes) if names]
    return [sum(path.suffix == ".parquet" for path in folder.iterdir()) for folder in folders]


def run_session(manifest: Path, out: Path, address: str, stop_at: int | None) -> Session:
    """Runs the command, to its end or until there are stop_at commits, when it is killed."""
    words = ["caption", "--images", str(manifest), "--out", str(out), "--address", address]
    words += ["--engine", "fake", "--fake.image-side", str(SIZE), "--rows-per-commit", str(COMMIT_ROWS)]
    number = len(list((out / "work" / "sessions").glob("*.json")))
    outcomes, start = out / "work" / "outcomes", time.time()
    log = out.with_name(f"session-{number}.log")
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=stderr, text=True
        )
    first, memory, looked = 0.0, 0, 0.0
    while process.poll() is None:
        memory = max(memory, peak_memory(process.pid))
        if not first and files_of(outcomes / f"{number:04}"):
            first = time.time() - start
        if stop_at is not None and first and time.time() - looked > 1:
            looked = time.time()
            if sum(files_of(outcomes)) >= stop_at:
                process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode != (0 if stop_at is None else -signal.SIGKILL):
        sys.exit(f"session {number} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    print(log.read_text(), flush=True)
    return Session(first, time.time() - start, memory)


def measure(rows: int, folder: Path) -> None:
    """Prints a table of both sessions, each on nodes that were just started."""
    manifest, out = make_input(folder, rows, SIZE), folder / "run"
    time.sleep(3)  # what was written a moment ago is not trusted to be unchanged
    commits = -(-rows // COMMIT_ROWS)
    with nodes(0, 2, 2) as cluster:
        killed = run_session(manifest, out, cluster.address, stop_at=commits // 2)
    counts = files_of(out / "work" / "outcomes")
    with nodes(0, 2, 2) as cluster:
        resumed = run_session(manifest, out, cluster.address, stop_at=None)
    summary = json.loads((out / "summary.json").read_text())
    if (summary["rows"], summary["captions"], summary["duplicates_dropped"]) != (rows, rows, 0):
        sys.exit(f"the outcome is wrong: {summary}")
    print(f"{rows:,} rows, {commits:,} commits of {COMMIT_ROWS} rows")
    print(f"at the kill {sum(counts):,} files, at most {max(counts):,} in one folder")
    print(f"{'':8} {'first commit':>14} {'ended after':>12} {'driver':>8}")
    for name, session in (("killed", killed), ("resumed", resumed)):
        print(
            f"{name:8} {session.first_commit:12.1f} s {session.seconds:10.1f} s {session.memory:5} MB",
            flush=True,
        )
    size = (out / "summary.json").stat().st_size
    print(f"steady {summary['images_per_second']:,.0f} images/s, summary.json of {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_200_000)
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="resume-size-") as folder:
        measure(options.rows, Path(folder))


if __name__ == "__main__":
    main()
