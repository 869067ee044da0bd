"""Chooses how long OpenMP's threads spin while they wait for each other."""

import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

_SPINS = "1000"
"""Rounds of a waiting loop, some microseconds, before a thread sleeps; libgomp's own number is 300,000.

A decode step meets at hundreds of barriers. Where another process has taken a core, the thread that is waited
for has none, and the one that spins holds the core that it could run on. On a quiet machine spinning is
right: waking a thread takes longer than most waits. benchmarks/README.md has the rates.
"""

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_SAMPLES, _SAMPLE_SECONDS = 3, 0.03

_OWN_CORE = 0.85
"""The share of time that a thread computes, from which on it counts as having a core of its own."""


def limit_spinning(threads: int) -> None:
    """Sets GOMP_SPINCOUNT where so many threads have not a core each now.

    libgomp reads it when torch is loaded, so it has no effect after that. Keeps what the environment says.
    """
    given = any(name in os.environ for name in _SETTINGS)
    if threads > 1 and not given and "torch" not in sys.modules and cores_are_shared(threads):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def cores_are_shared(threads: int) -> bool:
    """Tries in a tenth of a second whether so many threads can compute at once.

    Returns False as soon as one sample finds a core for each: the starts of other processes are short.
    """
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_SAMPLES):
            if min(pool.map(lambda _: _share_of_core(), range(threads))) >= _OWN_CORE:
                return False
    return True


def _share_of_core() -> float:
    """Computes for a sample's time; returns the share of it in which this thread had a core."""
    block = bytes(1 << 20)  # hashing it releases the interpreter's lock
    wall, own = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < _SAMPLE_SECONDS:
        hashlib.blake2b(block).digest()
    return (time.thread_time() - own) / (time.perf_counter() - wall)
