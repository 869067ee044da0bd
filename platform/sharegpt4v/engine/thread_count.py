"""Chooses with how many threads an engine computes while other processes keep cores busy.

The threads of a pass meet at hundreds of barriers. Where another process has one of the cores, all wait for
the thread that has none: two threads beside one busy process computed a tenth of what one did alone
(benchmarks/README.md). The system tells how long threads waited for a core; whether fewer are
faster is tried.
"""

from collections.abc import Callable
from pathlib import Path

_WINDOW = 0.2
"""Seconds of work over which a rate is measured."""

_CONTENDED = 0.1
"""Share of time that threads wait for a core from which on fewer are tried."""

_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 32.0
"""Seconds of work until the next trial; doubled after each trial that brought nothing."""

_GAIN = 1.1
"""How many times as fast fewer threads have to be, or rates that differ by chance would decide."""


def seconds_without_core() -> float:
    """Returns how long this process' threads have waited for a core so far; 0 where that is not counted."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # a thread that has ended, or a system that does not count
    return nanoseconds / 1e9


class ThreadCount:
    """The number of threads, `most` of them unless fewer are faster now.

    Halves them while threads wait for a core, if that is faster, and tries twice as many now and then.
    """

    def __init__(self, most: int, waited: Callable[[], float] = seconds_without_core) -> None:
        """Begins with `most`. waited: returns the seconds that all threads have waited for a core so far."""
        self.now = most
        self._most, self._waited = most, waited
        self._before: tuple[int, float] | None = None  # threads and rate that a trial is compared with
        self._pause, self._until_trial = _FIRST_PAUSE, 0.0
        self._begin_window()

    def _begin_window(self) -> None:
        self._tokens, self._seconds = 0, 0.0
        self._waited_before = self._waited()

    def computed(self, tokens: int, seconds: float) -> int:
        """Notes a pass over `tokens` rows; returns the number of threads for the next one."""
        if self._most == 1:
            return 1
        self._tokens += tokens
        self._seconds += seconds
        if self._seconds >= _WINDOW:
            self._end_window()
            self._begin_window()
        return self.now

    def _end_window(self) -> None:
        rate = self._tokens / self._seconds
        self._until_trial -= self._seconds
        if self._before is not None:
            self._judge(rate, *self._before)
        elif self._until_trial <= 0 and (other := self._other_number()) != self.now:
            self._before = self.now, rate
            self.now = other

    def _judge(self, rate: float, threads: int, rate_before: float) -> None:
        """Ends a trial: keeps its number of threads if that was faster."""
        fewer = self.now < threads
        if rate > rate_before * (_GAIN if fewer else 1):
            self._pause = _FIRST_PAUSE
        else:
            self.now = threads
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._before, self._until_trial = None, self._pause

    def _other_number(self) -> int:
        share = (self._waited() - self._waited_before) / self._seconds
        if share > _CONTENDED and self.now > 1:
            return self.now // 2
        return min(self._most, 2 * self.now)
