"""What all engines have that keep their requests in a scheduler and work in a thread of their own."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.stats import EngineStats, Latencies
from sharegpt4v.errors import UserError


def refuse_likelihoods(request: Request, engine: str) -> None:
    """Raises UserError for a request for log probabilities or the likelihood of options."""
    if request.options or request.sampling.logprobs is not None:
        raise UserError(f"the {engine} engine computes no log probabilities: the torch engine does")


class ScheduledEngine(ABC):
    """Has all of `Engine` but `count`. A subclass sets the attributes below and its thread steps."""

    model: str
    capacity: int
    context: int
    computes_logprobs = False
    _scheduler: Scheduler[Any]
    _thread: threading.Thread

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking.

        Raises EngineClosed once the engine is closed or draining, EngineBusy when its queue is full.
        """
        return self._scheduler.submit(request)

    @abstractmethod
    def count(self, turns: Sequence[Turn]) -> int:
        """Returns the tokens of a prompt, images included. Raises UserError for roles out of order."""

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to the text. Raises UserError: most engines have no log probabilities."""
        raise UserError(f"token {token}: this engine computes no log probabilities, the torch engine does")

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def latencies(self) -> Latencies:
        return self._scheduler.latencies()

    @property
    def last_progress(self) -> float:
        """time.monotonic() of the last token or prefill, or of the last request that found it idle."""
        return self._scheduler.last_progress

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses further requests and waits, `timeout` seconds at most; returns whether all are finished."""
        return self._scheduler.drain(timeout)

    def close(self) -> None:
        """Fails unfinished requests with EngineClosed and joins the engine's thread."""
        self._scheduler.close()
        self._thread.join()
