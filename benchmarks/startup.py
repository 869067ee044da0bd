"""What a small run is made of: `sharegpt4v caption` of 200 toy images from the command to its return.

    python -m benchmarks.startup --rounds 5

Each line is a phase as the command names it, with the seconds between its beginning and the next one's:
medians of all rounds. CPU seconds are those of all processes of the command, read ten times a second: on a
machine that does other work as well they tell more than wall time does.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import describe_machine
from sharegpt4v.toy.images import write_images

PHASES = {
    "importing": r"reading ",
    "reading the manifest": r"starting Ray",
    "starting Ray": r"loading ",
    "loading the captioner": None,  # until its first commit is seen
    "captioning": r"captioned (?P<n>[\d,]+) of (?P=n)\b",
    "leaving Ray, audit": r"writing the report",
    "report, leaving Python": None,  # until the command returns
}
"""Name of each phase, and what the line on stderr begins with that ends it."""


@dataclass(frozen=True)
class Round:
    """ends: seconds from the command to the end of each phase. cpu: seconds of all `processes`."""

    ends: list[float]
    cpu: float
    processes: int


def measure(images: Path, out: Path, flags: list[str]) -> Round:
    """Runs the command once. Ends this program when the command fails or says a phase that is not known."""
    command = [sys.executable, "-m", "cluster.cli", "caption", "--images", str(images), "--out", str(out)]
    log = out.with_suffix(".log")
    start = time.time()
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            command + flags, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
    cpu: dict[int, float] = {}
    first_commit = 0.0
    while process.poll() is None:
        cpu |= cpu_seconds(process.pid)
        if not first_commit:
            written = list((out / "work" / "outcomes").rglob("*.parquet"))
            first_commit = min((path.stat().st_mtime - start for path in written), default=0.0)
        time.sleep(0.1)
    returned, text = time.time() - start, log.read_text()
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}:\n{text[-2000:]}")
    ends = []
    for phase, pattern in PHASES.items():
        found = re.search(rf"^ *([\d.]+) s  {pattern}", text, re.MULTILINE) if pattern else None
        if pattern and not found:
            sys.exit(f"the command did not say how long {phase!r} took:\n{text}")
        ends.append(float(found[1]) if found else first_commit if "loading" in phase else returned)
    return Round(ends, sum(cpu.values()), len(cpu))


def cpu_seconds(session: int) -> dict[int, float]:
    """CPU seconds so far of every process of this session, by process id."""
    seconds = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session:
            seconds[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="torch", help="torch with the toy captioner, or fake")
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        images = Path(folder) / "images"
        write_images(images, options.images, seed=1)
        flags = ["--engine", options.engine]
        rounds = [measure(images, Path(folder) / f"run-{n}", flags) for n in range(options.rounds)]
    middle = statistics.median
    before = [0.0] * len(rounds)
    for index, phase in enumerate(PHASES):
        ends = [one.ends[index] for one in rounds]
        length = middle(end - start for end, start in zip(ends, before, strict=True))
        print(f"{phase:<25}{length:6.1f} s, ends at {middle(ends):5.1f} s")
        before = ends
    walls = ", ".join(f"{end:.1f}" for end in ends)
    print(f"command to return: {middle(ends):.1f} s (rounds {walls})")
    cpu, processes = middle(one.cpu for one in rounds), middle(one.processes for one in rounds)
    print(f"CPU: {cpu:.1f} s in {processes:.0f} processes")


if __name__ == "__main__":
    main()
