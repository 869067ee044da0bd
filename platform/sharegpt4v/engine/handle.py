"""The engine interface that captioning and chat share.

`submit(request) -> Handle` may be called from any thread. The engine owns one thread that
does the work; a handle returns the finished completion, streams it piece by piece or cancels it, and
can be awaited from asyncio. The configuration chooses the engine behind it (torch, vllm, transformers, fake).
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import suppress
from typing import Any, Protocol

from sharegpt4v.dialogue import Completion, Request
from sharegpt4v.engine.stats import EngineStats


class EngineError(RuntimeError):
    """One request failed; the others continue. The message is one line that a reject record can hold."""


class EngineClosed(EngineError):
    """The engine was closed, or its thread ended, before this request was finished."""


def one_line(error: Exception) -> str:
    """Returns the message in one line for a reject record, with the type of errors that are not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"


class Handle:
    """A request in progress. Engines call `push` and one of `finish` or `fail`; callers use the rest.

    Every caller gets every piece: several may iterate, await and call `result` at the same time.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self.cancelled = False
        self._pieces: list[str] = []
        self._completion: Completion | None = None
        self._error: EngineError | None = None
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def expired(self) -> bool:
        """Whether more seconds than the request's timeout have passed since submit."""
        timeout = self.request.timeout
        return timeout is not None and time.monotonic() - self.submitted > timeout

    def cancel(self) -> None:
        """Asks the engine to stop; the completion then ends with finish_reason cancelled and no text."""
        self.cancelled = True

    def done(self) -> bool:
        return self._completion is not None or self._error is not None

    def result(self, timeout: float | None = None) -> Completion:
        """Blocks for at most `timeout` seconds.

        Raises EngineError when this request failed and TimeoutError when it is not finished in time.
        """
        if not self.done():
            with self._changed:
                if not self._changed.wait_for(self.done, timeout):
                    raise TimeoutError(f"request {self.request.id!r} is not finished after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of text in order; raises EngineError after the last one when the request failed."""
        seen = 0
        while True:
            with self._changed:
                while not (fresh := self._pieces[seen:]) and not self.done():
                    self._changed.wait()
            if not fresh:
                self.result(0)
                return
            yield from fresh
            seen += len(fresh)

    def __await__(self) -> Generator[Any, None, Completion]:
        yield from self._ended().__await__()
        return self.result(0)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yields as `__iter__` does, without blocking a thread while it waits."""
        seen, changed = 0, asyncio.Event()
        with self._changed:
            self._waiters.append((asyncio.get_running_loop(), changed))
        while True:
            changed.clear()
            fresh = self._pieces[seen:]
            if fresh:
                for piece in fresh:
                    yield piece
                seen += len(fresh)
            elif self.done():
                self.result(0)
                return
            else:
                await changed.wait()

    @property
    def shown(self) -> str:
        """The text pushed so far."""
        return "".join(self._pieces)

    def push(self, piece: str) -> None:
        if not piece:
            return
        with self._changed:
            self._pieces.append(piece)
            self._notify()

    def finish(self, completion: Completion) -> None:
        """Ends the request; later calls of `finish` and `fail` have no effect."""
        with self._changed:
            if not self.done():
                self._completion = completion
                self._notify()

    def fail(self, error: EngineError) -> None:
        """Ends the request with an error, as `finish` does with a completion."""
        with self._changed:
            if not self.done():
                self._error = error
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, changed in self._waiters:
            # A loop closed meanwhile has no waiters left; its RuntimeError must not end the engine's thread.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

    async def _ended(self) -> None:
        changed = asyncio.Event()
        with self._changed:
            self._waiters.append((asyncio.get_running_loop(), changed))
        while not self.done():
            changed.clear()
            if not self.done():
                await changed.wait()


class Engine(Protocol):
    """The interface that pipelines and servers may rely on.

    The shape of its images is the model card's `images`.
    """

    model: str  # name@digest, stored beside every caption
    capacity: int  # requests in progress at once; more wait in its queue

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking. Raises EngineClosed once the engine is closed."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Fails unfinished requests with EngineClosed and joins the engine's thread."""
