"""Decides which requests wait, begin, run or are tried again, and in which slots, in plain Python.

An engine's thread calls `receive`, `admit`, `place` for each prompt it has prefilled and `take` for each new
token, and `suspect` after a step that failed; nothing here computes or starts a thread. `submit`, `stats`,
`close` and `wait_closed` may be called from any thread, the rest from the engine's thread alone.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

from sharegpt4v.dialogue import Completion, Request
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle, one_line
from sharegpt4v.engine.intake import Intake
from sharegpt4v.engine.stats import EngineStats

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 0.1
"""Interval at which all requests are checked for cancelled and expired ones."""

_GROUP_SECONDS = 0.2
"""How long requests wait at most for others to begin with while slots are free."""


class Running(Protocol):
    """A request in its slot."""

    handle: Handle
    tokens: list[int]  # generated so far

    @property
    def position(self) -> int:
        """The position of the last token in the slot."""

    def take(self, token: int) -> Completion | None:
        """Appends a token. Returns the answer once it is complete; raises when the request is at fault."""


def _short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError)


R = TypeVar("R", bound=Running)


class Scheduler(Generic[R]):
    """Holds every unfinished request of an engine, each in exactly one place.

    slots: requests that may begin or run at once. group: while others run, requests begin once this many
    slots are free, or enough for all that wait, so that they are prefilled together. concerns_all: returns
    whether no single request is at fault for an error.
    """

    def __init__(
        self, slots: int, group: int = 1, concerns_all: Callable[[Exception], bool] = _short_of_memory
    ) -> None:
        self.beginning: dict[int, Handle] = {}  # by slot; admitted, not yet placed
        self.running: dict[int, R] = {}  # by slot
        self._slots, self._group = slots, group
        self._concerns_all = concerns_all
        self._intake = Intake()
        self._waiting: deque[Handle] = deque()
        self._suspects: deque[list[Handle]] = deque()  # groups to be tried separately
        self._swept = 0.0
        self._idle_since: float | None = None  # since when slots are free and requests wait
        self._counts: dict[str, Any] = {}  # fields of EngineStats; replaced as one for other threads

    # From any thread

    @property
    def closed(self) -> bool:
        return self._intake.closed

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking. Raises EngineClosed once closed."""
        return self._intake.submit(request)

    def stats(self) -> EngineStats:
        queued = len(self._intake) + len(self._waiting) + sum(map(len, self._suspects))
        now = EngineStats(slots=self._slots, running=len(self.running), queued=queued)
        return replace(now, **self._counts)

    def close(self) -> None:
        """Refuses further requests and fails those not yet received; the engine's thread fails the others."""
        self._intake.close()

    def wait_closed(self) -> None:
        self._intake.wait_closed()

    # The round of the engine's thread

    def receive(self) -> None:
        """Takes over submitted requests, and waits for one when there is nothing else to do."""
        idle = not (self.beginning or self.running or self._waiting or self._suspects)
        self._waiting.extend(self._intake.take_all(wait=idle))
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self.sweep()

    def admit(self) -> dict[int, Handle]:
        """Gives slots to waiting requests; returns those that begin, by slot. Each is then placed, or ended.

        Suspects begin first, one group at a time and with no other request running.
        """
        if self._suspects:
            if not (self.running or self.beginning):
                self.beginning = dict(enumerate(self._suspects.popleft()))
        elif self._waiting:
            free = [s for s in range(self._slots) if s not in self.running and s not in self.beginning]
            if len(free) >= min(self._group, len(self._waiting)) or self._waited_enough(bool(free)):
                self.beginning |= {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
                self._idle_since = None
        for slot in list(self.beginning):
            self.drop_withdrawn(slot)
        return dict(self.beginning)

    def _waited_enough(self, slots_are_free: bool) -> bool:
        """Returns whether slots have been free for long while requests waited for a group."""
        if not slots_are_free:
            return False
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        return now - self._idle_since > _GROUP_SECONDS

    def place(self, slot: int, running: R) -> None:
        """Marks the request that begins in this slot as running."""
        del self.beginning[slot]
        self.running[slot] = running

    def take(self, slot: int, token: int) -> None:
        """Gives a running request its next token; finishes it and frees the slot when that completes it."""
        running = self.running[slot]
        if self._end_withdrawn(running.handle, len(running.tokens) + 1):
            del self.running[slot]
            return
        try:
            completion = running.take(token)
        except Exception as error:
            self.fail(slot, error)
            return
        if completion is not None:
            self.finish(slot, completion)

    @property
    def has_gaps(self) -> bool:
        """Whether `compact_slots` would move a request."""
        count = len(self.running)
        if self._waiting or self._suspects or self.beginning or count == 0:
            return False
        return max(self.running) >= count

    def compact_slots(self) -> list[tuple[int, int]]:
        """Moves the last requests into free slots when none waits: steps then compute no gaps.

        Returns (source, target) of each move, so that the engine can move its own state by slot.
        """
        if not self.has_gaps:
            return []
        count = len(self.running)
        sources = sorted(slot for slot in self.running if slot >= count)
        targets = [slot for slot in range(count) if slot not in self.running]
        moves = list(zip(sources, targets, strict=True))
        for source, target in moves:
            self.running[target] = self.running.pop(source)
        return moves

    def count(self, **more: float) -> None:
        """Adds to the statistics at every step, so that a watchdog can see that the engine makes progress."""
        self._counts = self._counts | {name: self._counts.get(name, 0) + more[name] for name in more}

    # Ends

    def finish(self, slot: int, completion: Completion) -> None:
        """Finishes the request in this slot and frees the slot."""
        handle = self._release(slot)
        self.count(requests=1)
        handle.finish(completion)

    def fail(self, slot: int, error: Exception) -> None:
        """Fails the request in this slot and frees it. Raises the error if no single request is at fault."""
        if self._concerns_all(error):
            raise error
        self._fail(self._release(slot), error)

    def drop_withdrawn(self, slot: int) -> bool:
        """Ends a cancelled or expired request in this slot and frees the slot; returns whether it did."""
        running = self.running.get(slot)
        handle, tokens = (running.handle, len(running.tokens)) if running else (self.beginning[slot], 0)
        ended = self._end_withdrawn(handle, tokens)
        if ended:
            self._release(slot)
        return ended

    def sweep(self) -> None:
        """Ends all cancelled and expired requests: waiting, suspect, beginning or running."""
        self._waiting = deque(handle for handle in self._waiting if not self._end_withdrawn(handle))
        groups = ([handle for handle in group if not self._end_withdrawn(handle)] for group in self._suspects)
        self._suspects = deque(group for group in groups if group)
        for slot in [*self.beginning, *self.running]:
            self.drop_withdrawn(slot)
        self._swept = time.monotonic()

    def _end_withdrawn(self, handle: Handle, tokens: int = 0) -> bool:
        """Finishes a cancelled request, fails an expired one; returns whether. tokens: generated so far."""
        if handle.cancelled:
            handle.finish(Completion("", tokens, "cancelled"))
            return True
        failure: Exception | None = None
        try:
            if handle.expired:
                limit = f"{handle.request.timeout:g} s"
                failure = EngineError(f"not finished within its {limit}, after {tokens} tokens")
        except Exception as error:  # the timeout is not a number, or this is not a Request
            failure = error
        if failure is not None:
            self._fail(handle, failure)
        return failure is not None

    def _fail(self, handle: Handle, error: Exception) -> None:
        self.count(failed=1)
        handle.fail(EngineError(one_line(error)))

    def _release(self, slot: int) -> Handle:
        running = self.running.pop(slot, None)
        return running.handle if running else self.beginning.pop(slot)

    # Failures of a step

    def suspect(self, error: Exception) -> None:
        """Queues each half of a failed step's requests for a separate try; fails one that was alone.

        Seeds make the answers the same on the second try. Frees the slots. Raises the error when no single
        request is at fault.
        """
        handles = self._admitted()
        if self._concerns_all(error) or not handles:
            raise error
        log.error("a step failed", exc_info=error)
        self._clear_slots()
        if len(handles) == 1:
            self._fail(handles[0], error)
            return
        half = len(handles) // 2
        self._suspects.extendleft([handles[half:], handles[:half]])

    def restart(self, slots: int, group: int) -> None:
        """Sets the number of slots. Admitted and suspect requests wait again, before all others."""
        # Suspects as well: their groups may be larger than the new number of slots.
        self._waiting.extendleft(reversed([*self._admitted(), *chain(*self._suspects)]))
        self._suspects.clear()
        self._clear_slots()
        self._slots, self._group = slots, group

    def abandon(self, why: str) -> None:
        """Closes, and fails all unfinished requests with EngineClosed."""
        self.close()
        for handle in (*self._admitted(), *self._waiting, *chain(*self._suspects)):
            handle.fail(EngineClosed(why))

    def _admitted(self) -> list[Handle]:
        return [*(running.handle for running in self.running.values()), *self.beginning.values()]

    def _clear_slots(self) -> None:
        self.beginning, self.running = {}, {}
