"""How soon training trains: from the command to its first finished step, on a machine without a compiler.

    python -m benchmarks.train_start --rounds 3

`sharegpt4v train sft` with ZeRO-2 on one worker and with ZeRO-3 on two, toy model, CPU. The command finds
every program that we do but compilers and their like, so that DeepSpeed can build nothing.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine
from sharegpt4v.toy.images import write_images

SIDES = ((2, 1, 20), (3, 2, 35))
"""ZeRO stage, workers, and the seconds that the first step may take."""

PHASES = {
    "importing": r"reading data",
    "reading data": r"(?:starting|connecting to) ",
    "starting Ray": r"loading ",
    "workers, imports, model, DeepSpeed": None,  # until the first worker opens its logs
    "first step": None,  # until its line is in metrics.jsonl
}
"""Name of each phase, and what the line on stderr begins with that ends it."""

_BUILDS = re.compile(
    r"(?:.*-)?(?:cc|c89|c99|gcc|g\+\+|c\+\+|clang(?:\+\+)?|nvcc|ld|as|ninja|make)(?:-[\d.]+)?"
)


def write_data(folder: Path) -> list[str]:
    """Writes scenes with their captions as conversations; returns the flags that name them."""
    images = folder / "images"
    write_images(images, 64, seed=1)
    records = [json.loads(line) for line in (images / "truth.jsonl").read_text().splitlines()]
    for record in records:
        record["conversations"] = [
            {"from": "human", "value": "<image>\nA photo of"},
            {"from": "gpt", "value": record["caption"]},
        ]
    (folder / "talk.json").write_text(json.dumps(records))
    return ["--data", str(folder / "talk.json"), "--root", str(images)]


def without_compilers(folder: Path) -> str:
    """Links all programs of PATH but those that build; returns the PATH of the links alone."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            link = folder / program.name
            if not _BUILDS.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program.absolute())
    found = [
        name for name in ("cc", "gcc", "g++", "c++", "clang", "ninja") if shutil.which(name, path=str(folder))
    ]
    assert not found, found
    return str(folder)


def measure(words: list[str], out: Path, path: str) -> list[float]:
    """Runs the command for one step; returns the seconds from its start to the end of each phase."""
    caches = {
        name: str(out.parent / f"{out.name}-{name}") for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    log, start = out.with_suffix(".log"), time.time()
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *words, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment | caches | {"PATH": path},
        )
    opened = first = 0.0
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        opened = opened or ((out / "tensorboard").exists() and time.time() - start)
        first = first or (metrics.exists() and metrics.stat().st_size > 0 and time.time() - start)
        time.sleep(0.05)
    text = log.read_text()
    if process.returncode or not first:
        sys.exit(f"the run failed with {process.returncode}:\n{text[-2000:]}")
    said = [
        re.search(rf"^ *([\d.]+) s  {pattern}", text, re.MULTILINE) for pattern in PHASES.values() if pattern
    ]
    if not all(said):
        sys.exit(f"the command did not say all of its phases:\n{text}")
    return [*(float(found[1]) for found in said if found), opened, first]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="train-start-") as name:
        folder = Path(name)
        data, path = write_data(folder), without_compilers(folder / "bin")
        for zero, workers, target in SIDES:
            words = [
                "train",
                "sft",
                *data,
                "--zero",
                str(zero),
                "--workers",
                str(workers),
                "--stop-after",
                "1",
            ]
            words += ["--optimizer", "adamw", "--batch-size", "16", "--max-steps", "10"]
            rounds = [measure(words, folder / f"{zero}-{n}", path) for n in range(options.rounds)]
            report(f"ZeRO-{zero}, {workers} worker{'s' * (workers > 1)}", rounds, target)


def report(side: str, rounds: list[list[float]], target: int) -> None:
    """Prints the median of each phase, and of the whole."""
    before = [0.0] * len(rounds)
    for index, phase in enumerate(PHASES):
        ends = [one[index] for one in rounds]
        length = statistics.median(end - start for end, start in zip(ends, before, strict=True))
        print(f"{side}: {phase:<35}{length:6.1f} s, ends at {statistics.median(ends):5.1f} s")
        before = ends
    walls = ", ".join(f"{end:.1f}" for end in before)
    print(f"{side}: first step after {statistics.median(before):.1f} s (rounds {walls}), target {target} s")


if __name__ == "__main__":
    main()
