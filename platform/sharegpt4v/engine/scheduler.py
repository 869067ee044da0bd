"""Decides which requests wait, begin, run or are tried again, and in which slots, in plain Python.

An engine's thread calls `receive`, `admit`, `place` for each prompt it has prefilled and `take` for each new
token, and `suspect` after work that failed; nothing here computes or starts a thread. `submit`, `stats`,
`drain`, `close` and `wait_closed` may be called from any thread, the rest from the engine's thread alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Generic, TypeVar

from sharegpt4v.dialogue import Completion, Request
from sharegpt4v.engine.handle import EngineBusy, EngineClosed, EngineError, Handle, Running, as_engine_error
from sharegpt4v.engine.intake import Intake
from sharegpt4v.engine.stats import EngineStats, Latencies, Seconds
from sharegpt4v.engine.trials import Trials

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 0.1
"""Interval at which all requests are checked for cancelled and expired ones."""

_GROUP_SECONDS = 0.2
"""How long requests wait at most for others to begin with while slots are free."""

_DRAIN_POLL_SECONDS = 0.01


R = TypeVar("R", bound=Running)


def _short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError)


class Scheduler(Generic[R]):
    """Holds every unfinished request of an engine, each in exactly one place.

    slots: requests that may begin or run at once. group: while others run, requests begin once this many
    slots are free, or enough for all that wait, so that they are prefilled together. concerns_all: returns
    whether no single request is at fault for an error. max_queue: most requests that wait. pauses: whether
    steps compute only the requests in `live`, so that suspects are tried while the others pause; otherwise
    they are tried once nothing else runs. released: called with each slot that a request leaves. step_rows:
    how many slots a step computes when the last live one is the n-th; n by default.
    """

    def __init__(
        self,
        slots: int,
        group: int = 1,
        concerns_all: Callable[[Exception], bool] = _short_of_memory,
        max_queue: int | None = None,
        pauses: bool = False,
        released: Callable[[int], None] | None = None,
        step_rows: Callable[[int], int] = int,
    ) -> None:
        self.beginning: dict[int, Handle] = {}  # by slot; admitted, not yet placed
        self.running: dict[int, R] = {}  # by slot
        self._slots, self._group = slots, group
        self._concerns_all = concerns_all
        self._max_queue = max_queue
        self._released, self._step_rows = released, step_rows
        self._intake = Intake()
        self._submitting = threading.Lock()
        self._waiting: deque[Handle] = deque()
        self._trials = Trials(to_the_end=not pauses)
        self._interrupted: dict[Handle, R] = {}  # began once and wait for a slot again
        self._swept = 0.0
        self._idle_since: float | None = None  # since when slots are free and requests wait
        self._counts: dict[str, Any] = {}  # fields of EngineStats; replaced as one for other threads
        self._first_tokens, self._next_tokens = Seconds(), Seconds()
        self.last_progress = time.monotonic()

    # From any thread

    @property
    def closed(self) -> bool:
        return self._intake.closed

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking.

        Raises EngineClosed once closed or draining, EngineBusy while `max_queue` requests wait.
        """
        if self._max_queue is None or self._intake.refusing:
            return self._intake.submit(request)
        with self._submitting:
            if (waiting := self._queued()) >= self._max_queue:
                raise EngineBusy(f"{waiting} requests wait for a slot already: try again later")
            return self._intake.submit(request)

    def stats(self) -> EngineStats:
        now = EngineStats(slots=self._slots, running=len(self.running), queued=self._queued())
        return replace(now, **self._counts)

    def latencies(self) -> Latencies:
        return Latencies(self._first_tokens.copy(), self._next_tokens.copy())

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses further requests and waits for the unfinished ones; returns whether all are finished."""
        self._intake.refuse()
        end = None if timeout is None else time.monotonic() + timeout
        while self._queued() or self.beginning or self.running:
            if self.closed or (end is not None and time.monotonic() >= end):
                return False
            time.sleep(_DRAIN_POLL_SECONDS)
        return True

    def close(self) -> None:
        """Refuses further requests and fails those not yet received; the engine's thread fails the others."""
        self._intake.close()

    def wait_closed(self) -> None:
        self._intake.wait_closed()

    def _queued(self) -> int:
        return len(self._intake) + len(self._waiting) + self._trials.waiting

    # The round of the engine's thread

    def receive(self) -> None:
        """Takes over submitted requests, and waits for one when there is nothing else to do."""
        idle = not (self.beginning or self.running or self._waiting or self._trials)
        self._waiting.extend(self._intake.take_all(wait=idle))
        if idle:
            self.last_progress = time.monotonic()  # it has only begun to work
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self.sweep()

    def admit(self) -> dict[int, Handle]:
        """Gives slots to waiting requests; returns those that begin, by slot. Each is then placed, or ended.

        Suspects begin first, one group at a time.
        """
        free = [s for s in range(self._slots) if s not in self.running and s not in self.beginning]
        if self._trials:
            alone = not (self.running or self.beginning)
            if alone or not self._trials.to_the_end:
                self._begin(free, self._trials.next_group(len(free)))
        elif self._waiting and free:
            now = time.monotonic()
            self._idle_since = self._idle_since or now
            waited = now - self._idle_since > _GROUP_SECONDS
            if len(free) >= min(self._group, len(self._waiting)) or waited:
                count = min(len(free), len(self._waiting))
                self._begin(free, [self._waiting.popleft() for _ in range(count)])
                self._idle_since = None
        for slot in list(self.beginning):
            self.drop_withdrawn(slot)
        return dict(self.beginning)

    def _begin(self, free: list[int], handles: list[Handle]) -> None:
        for slot, handle in zip(free, handles, strict=False):
            handle.begun = handle.begun or time.monotonic()
            self.beginning[slot] = handle

    def interrupted(self, handle: Handle) -> R | None:
        """Returns the state of a request that ran before and begins again, None for a new one."""
        return self._interrupted.get(handle)

    def place(self, slot: int, running: R) -> None:
        """Marks the request that begins in this slot as running."""
        handle = self.beginning.pop(slot)
        self._interrupted.pop(handle, None)
        self.running[slot] = running

    @property
    def has_suspects(self) -> bool:
        """Whether requests are tried that shared work which failed."""
        return bool(self._trials)

    @property
    def live(self) -> dict[int, R]:
        """The requests that the next step computes, by slot: those on trial, otherwise all that run."""
        if not self._trials:
            return self.running
        tried = {slot: run for slot, run in self.running.items() if self._trials.on_trial(run.handle)}
        return tried or self.running

    def take(self, slot: int, token: int) -> None:
        """Gives a running request its next token; finishes it and frees the slot when that completes it."""
        running = self.running[slot]
        handle = running.handle
        self._clock(handle)
        if self._end_withdrawn(handle, len(running.tokens) + 1):
            self._release(slot)
            return
        try:
            completion = running.take(token)
        except Exception as error:
            self.fail(slot, error)
            return
        self._trials.took(handle)
        if completion is not None:
            self.finish(slot, completion)

    def _clock(self, handle: Handle) -> None:
        now = time.monotonic()
        if handle.first_token is None:
            handle.first_token = now
            self._first_tokens.add(now - handle.submitted)
        else:
            self._next_tokens.add(now - handle.last_token)
        handle.last_token = now

    @property
    def has_gaps(self) -> bool:
        """Whether steps would compute fewer slots after `compact_slots`."""
        if self._waiting or self._trials or self.beginning or not self.running:
            return False
        return self._step_rows(max(self.running) + 1) > self._step_rows(len(self.running))

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
        """Adds to the statistics at every step, and notes when: a watchdog sees that the engine works."""
        self._counts = self._counts | {name: self._counts.get(name, 0) + more[name] for name in more}
        self.last_progress = time.monotonic()

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
        handle = running.handle if running else self.beginning[slot]
        ended = self._end_withdrawn(handle, self._tokens(handle, running))
        if ended:
            self._release(slot)
        return ended

    def sweep(self) -> None:
        """Ends all cancelled and expired requests: waiting, suspect, beginning or running."""
        self._waiting = deque(h for h in self._waiting if not self._end_withdrawn(h, self._tokens(h)))
        self._trials.keep([h for h in self._trials if not self._end_withdrawn(h, self._tokens(h))])
        for slot in [*self.beginning, *self.running]:
            self.drop_withdrawn(slot)
        self._swept = time.monotonic()

    def _tokens(self, handle: Handle, running: R | None = None) -> int:
        running = running or self._interrupted.get(handle)
        return len(running.tokens) if running else 0

    def _end_withdrawn(self, handle: Handle, tokens: int) -> bool:
        """Finishes a cancelled request, fails an expired one; returns whether. tokens: generated so far."""
        if handle.cancelled:
            self._interrupted.pop(handle, None)
            self.count(cancelled=1)
            handle.finish(Completion("", tokens, "cancelled"))
            return True
        failure: Exception | None = None
        try:
            if handle.expired:
                limit = f"{handle.request.timeout:g} s"
                failure = EngineError(f"not finished within its {limit}, after {tokens} tokens", "timeout")
        except Exception as error:  # the timeout is not a number, or this is not a Request
            failure = error
        if failure is not None:
            self._fail(handle, failure)
        return failure is not None

    def _fail(self, handle: Handle, error: Exception) -> None:
        self._interrupted.pop(handle, None)
        self.count(failed=1)
        handle.fail(as_engine_error(error))

    def _release(self, slot: int) -> Handle:
        running = self.running.pop(slot, None)
        handle = running.handle if running else self.beginning.pop(slot)
        self._trials.ended(handle)
        if self._released is not None:
            self._released(slot)
        return handle

    # Failures of a step

    def suspect(self, error: Exception, slots: Collection[int] | None = None) -> None:
        """Frees the slots whose requests shared work that failed, and has each half of them tried separately.

        slots: all that begin or run by default. They go on from the tokens they have. One that was alone
        fails. Raises the error when no single request is at fault.
        """
        slots = [*self.running, *self.beginning] if slots is None else list(slots)
        if self._concerns_all(error) or not slots:
            raise error
        log.error("a step failed", exc_info=error)
        if len(slots) == 1:
            self._fail(self._release(slots[0]), error)
            return
        self._trials.suspect([self._interrupt(slot) for slot in slots])

    def restart(self, slots: int, group: int) -> None:
        """Sets the number of slots. Admitted and suspect requests wait again, before all others.

        They go on from the tokens they have.
        """
        admitted = [self._interrupt(slot) for slot in [*self.running, *self.beginning]]
        # Suspects as well: their groups may be larger than the new number of slots.
        self._waiting.extendleft(reversed([*admitted, *self._trials]))
        self._trials.clear()
        self._slots, self._group = slots, group

    def _interrupt(self, slot: int) -> Handle:
        if slot in self.running:
            self._interrupted[self.running[slot].handle] = self.running[slot]
        return self._release(slot)

    def abandon(self, why: str) -> None:
        """Closes, and fails all unfinished requests with EngineClosed."""
        self.close()
        for slot in [*self.running, *self.beginning]:
            self._release(slot).fail(EngineClosed(why))
        for handle in (*self._waiting, *self._trials):
            handle.fail(EngineClosed(why))
        self._waiting.clear()
        self._trials.clear()
        self._interrupted.clear()
