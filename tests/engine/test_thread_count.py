"""The number of threads follows what other processes leave of the cores."""

import os
import subprocess
import sys
import time

import pytest

from sharegpt4v.engine.thread_count import ThreadCount, seconds_without_core


class Machine:
    """Computes passes of 64 tokens; `rates` are tokens/s by the number of threads."""

    def __init__(self, rates: dict[int, float], most: int = 2) -> None:
        self.rates, self.waited = rates, 0.0
        self.threads = ThreadCount(most, lambda: self.waited)
        self.seconds_with = dict.fromkeys(rates, 0.0)

    def work(self, seconds: float, waiting: dict[int, float]) -> int:
        """Returns the number of threads after so many seconds. waiting: share of time without a core."""
        end = sum(self.seconds_with.values()) + seconds
        while sum(self.seconds_with.values()) < end:
            threads = self.threads.now
            took = 64 / self.rates[threads]
            self.seconds_with[threads] += took
            self.waited += took * waiting.get(threads, 0.0)
            self.threads.computed(64, took)
        return self.threads.now


def test_a_quiet_machine_is_left_alone() -> None:
    machine = Machine({2: 9_000, 1: 7_000})
    assert machine.work(100, {2: 0.02}) == 2
    assert machine.seconds_with[1] == 0


def test_a_busy_core_is_left_to_others_and_taken_again() -> None:
    machine = Machine({2: 900, 1: 6_800})
    assert machine.work(1, {2: 0.6}) == 1
    before = machine.seconds_with[2]
    assert machine.work(100, {2: 0.6}) == 1
    assert machine.seconds_with[2] - before < 3, "trials of two threads cost 3 % of the time at most"
    machine.rates = {2: 9_000, 1: 7_000}
    assert machine.work(40, {2: 0.0}) == 2


def test_threads_that_wait_and_are_faster_all_the_same_are_kept() -> None:
    machine = Machine({2: 8_000, 1: 7_000})
    assert machine.work(100, {2: 0.5}) == 2
    assert machine.seconds_with[1] < 5


def test_many_threads_go_down_and_up_by_halves() -> None:
    machine = Machine({8: 100, 4: 1_000, 2: 5_000, 1: 4_000}, most=8)
    assert machine.work(30, {8: 0.9, 4: 0.9, 2: 0.5}) == 2
    machine.rates = {8: 20_000, 4: 10_000, 2: 5_000, 1: 2_500}
    assert machine.work(100, {}) == 8


def test_one_thread_stays_one() -> None:
    machine = Machine({1: 7_000}, most=1)
    assert machine.work(10, {1: 0.9}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the time that threads wait")
def test_the_system_tells_how_long_threads_wait() -> None:
    busy = "import time; end = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(3 * (os.cpu_count() or 1))]
    before, end = seconds_without_core(), time.monotonic() + 2
    while time.monotonic() < end:
        pass
    waited = seconds_without_core() - before
    for process in others:
        process.wait(60)
    if not waited:
        pytest.skip("this system does not count it")
    assert 0.2 < waited < 4
