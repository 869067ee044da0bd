"""Runs the real commands in processes of their own, the way users do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import outcome_files, read_outcomes

REPOSITORY = Path(__file__).resolve().parent.parent
PHOTOS = REPOSITORY.parent / "shared" / "data" / "photos"

needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the real photographs are not at {PHOTOS}")


def command(*arguments: str | Path) -> list[str]:
    """`sharegpt4v ARGUMENTS` through this interpreter, so that no installed script is needed."""
    return [sys.executable, "-m", "cluster.cli", *map(str, arguments)]


_NOT_OURS = {"RAY_ADDRESS", "RAY_AUTH_MODE", "PYTHONPATH"}
"""A cluster started inside this test process leaves its address and mode behind; no command may see them."""


def environment() -> dict[str, str]:
    paths = f"{REPOSITORY / 'platform'}{os.pathsep}{REPOSITORY}"
    kept = {key: value for key, value in os.environ.items() if key not in _NOT_OURS}
    return kept | {"PYTHONPATH": paths}


def sharegpt4v(*arguments: str | Path, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    """Runs the command to its end; the exit code is the caller's to judge."""
    return subprocess.run(
        command(*arguments),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_images(folder: Path, names: Iterable[str], size: int = 24) -> None:
    """Small JPEGs, each with pixels of its own."""
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)


def committed(run: Path) -> int:
    """Commits of all sessions that are not compacted yet."""
    return len(outcome_files(CaptionRun(run)))


def wait_for_commits(process: "subprocess.Popen[str]", run: Path, count: int, seconds: float = 90) -> None:
    """Returns once `count` commits stand in the run's work folder, or the process has ended."""
    deadline = time.monotonic() + seconds
    while committed(run) < count and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{committed(run)} of {count} commits after {seconds} s")
        time.sleep(0.05)


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9, as the out-of-memory killer or an impatient person would."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def outcomes_left(run: Path) -> int:
    """Rows in the undamaged files of work/outcomes."""
    tables = [read_outcomes(path) for path in outcome_files(CaptionRun(run))]
    return sum(len(table) for table in tables if table is not None)


def rows(run: Path, part: str) -> pa.Table:
    """All of captions/ or rejects/."""
    return pq.read_table(run / part)
