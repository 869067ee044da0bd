"""What the engines that run models have in common: many requests share each step of the model."""

import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from sharegpt4v.engine.failures import concerns_all
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.engine.threaded import ThreadedEngine, withdrawn
from sharegpt4v.models.adapter import Adapter

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 0.1
"""How often requests are looked through for those that were cancelled or whose time is over."""


class BatchingEngine(ThreadedEngine):
    """Holds what waits, and sees to it that a request which spoils a step does not cost the others theirs.

    slots: requests that may run at once. context: tokens of prompt and answer together.
    """

    def __init__(self, adapter: Adapter, slots: int, context: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.image_size = adapter.image_size
        self._context = context
        self._waiting: deque[Handle] = deque()
        self._beginning: list[Handle] = []  # neither waiting any more nor running yet
        self._suspects: deque[list[Handle]] = deque()  # groups, to be tried apart
        self._swept = 0.0
        self._stats = EngineStats(slots=slots)

    def stats(self) -> EngineStats:
        waiting = len(self._queue) + len(self._waiting) + sum(map(len, self._suspects))
        return replace(self._stats, queued=waiting, running=self._busy())

    @abstractmethod
    def _busy(self) -> int:
        """Requests that run; also asked from other threads."""

    @abstractmethod
    def _running(self) -> Iterable[Handle]:
        """Their handles."""

    @abstractmethod
    def _stop_running(self) -> None:
        """Takes all of them out of the model, as if they had never begun."""

    def _receive(self) -> None:
        """Takes over what was submitted, and waits for it where there is nothing else to do."""
        if not (self._busy() or self._waiting or self._suspects):
            first = self._queue.take()
            if first is None:
                return
            self._waiting.append(first)
        self._waiting.extend(self._queue.take_all())
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self._sweep()

    def _sweep(self) -> None:
        """Lets those go that nobody waits for any more, and those whose time is over."""
        self._waiting = deque(handle for handle in self._waiting if self._wanted(handle))
        groups = ([handle for handle in group if self._wanted(handle)] for group in self._suspects)
        self._suspects = deque(group for group in groups if group)
        self._swept = time.monotonic()

    def _wanted(self, handle: Handle, tokens: int = 0) -> bool:
        """Whether somebody still waits for this answer, of which `tokens` stand."""
        try:
            return not withdrawn(handle, tokens)
        except Exception as error:  # its time is over, or it is no request at all
            self._fail(handle, error)
            return False

    def _prompt_tokens(self, handle: Handle) -> int:
        """Raises EngineError when the context has no room for the prompt and an answer."""
        tokens = self.adapter.prompt_tokens(handle.request.turns)
        if tokens >= self._context:
            raise EngineError(
                f"the prompt has {tokens} tokens and the context {self._context}: nothing is left "
                f"to answer in; shorten the dialogue, or send fewer images"
            )
        return tokens

    def _unfinished(self) -> list[Handle]:
        """What runs or is about to."""
        handles = dict.fromkeys([*self._running(), *self._beginning])
        return [handle for handle in handles if not handle.done()]

    def _held(self) -> Iterable[Handle]:
        return (*self._unfinished(), *self._waiting, *chain(*self._suspects))

    def _suspect(self, error: Exception) -> None:
        """A step failed, and one request may be the reason: each half of them is tried again, apart.

        Seeds make the answers the same again. Raises the error when it is no request's fault.
        """
        handles = self._unfinished()
        if concerns_all(error) or not handles:
            raise error
        log.error("a step failed", exc_info=error)
        # Held as suspects before they are taken out: should that fail, too, they are not forgotten.
        half = len(handles) // 2
        groups = [handles[:half], handles[half:]] if half else [handles]
        self._suspects.extendleft(reversed(groups))
        self._beginning = []
        self._stop_running()
        if not half:
            self._suspects.popleft()
            self._fail(handles[0], error)
