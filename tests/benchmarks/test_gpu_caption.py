"""The script for a GPU machine runs from start to end at toy size: no rented hour is its first test."""

import re
import subprocess
import sys

from tests.commands import REPOSITORY, environment


def test_it_measures_every_model_at_toy_size() -> None:
    words = ["benchmarks/gpu_caption.py", "--toy", "--images", "6", "--slots", "4"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rates = dict(re.findall(r"^(\w+): ([\d.]+) images/s, ", done.stdout, re.MULTILINE))
    assert rates.keys() == {"lmm", "resampler", "qformer"}
    assert all(float(rate) > 0 for rate in rates.values())
    assert len(re.findall(r"ms a step, \d+% of measured bandwidth", done.stdout)) == 3
    assert "the paper's" not in done.stdout  # toy models are no match for it, in either direction
