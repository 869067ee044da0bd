"""Two threads of an engine beside processes that take every core."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sharegpt4v.engine.openmp import cores_are_shared
from tests.commands import REPOSITORY, environment

_RATE = """
import sys, time
import numpy as np
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.build import EngineSpec, build_engine

assert "torch" not in sys.modules
engine = build_engine(EngineSpec("torch", "toy@0", "toy", capacity=16, threads=int(sys.argv[1])))
params = SamplingParams(max_new_tokens=60, min_new_tokens=60)
question = Turn("user", "Describe it.", (np.zeros((48, 48, 3), np.uint8),))
start = time.perf_counter()
handles = [engine.submit(Request(str(number), (question,), params)) for number in range(16)]
tokens = sum(handle.result().tokens for handle in handles)
print(tokens / (time.perf_counter() - start))
engine.close()
"""

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


@pytest.fixture
def busy() -> Iterator[None]:
    """A process for every core that computes without end."""
    count = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for other in others:
        other.kill()
        other.wait()


def _rate(threads: int) -> float:
    clean = {name: value for name, value in environment().items() if name not in _SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", _RATE, str(threads)],
        cwd=REPOSITORY,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_two_threads_on_busy_cores_are_not_far_slower_than_one(busy: None) -> None:
    """With libgomp's own spinning they were 20 to 100 times slower."""
    assert _rate(2) > _rate(1) / 4


_SPINNING = """
import os, sys
from sharegpt4v.engine import openmp
openmp.cores_are_shared = lambda threads: True
if len(sys.argv) > 2: import torch
openmp.limit_spinning(int(sys.argv[1]))
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("arguments", "settings", "spins"),
    [
        (["2"], {}, "1000"),
        (["1"], {}, "None"),  # nobody waits
        (["2"], {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        (["2"], {"GOMP_SPINCOUNT": "7"}, "7"),
        (["2", "torch"], {}, "None"),  # too late
    ],
)
def test_spinning_is_limited_where_it_helps_and_nobody_has_said_otherwise(
    arguments: list[str], settings: dict[str, str], spins: str
) -> None:
    clean = {name: value for name, value in environment().items() if name not in _SETTINGS}
    words = [sys.executable, "-c", _SPINNING, *arguments]
    done = subprocess.run(words, env=clean | settings, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spins


def test_busy_cores_are_found_out(busy: None) -> None:
    assert cores_are_shared(len(os.sched_getaffinity(0)))
