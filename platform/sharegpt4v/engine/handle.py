"""The engine interface that captioning and chat share.

`submit(request) -> Handle` may be called from any thread. The engine owns one thread that
does the work; a handle returns the finished completion, streams it piece by piece or cancels it, and
can be awaited from asyncio. The configuration chooses the engine behind it (torch, vllm, transformers, fake).
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Literal, Protocol

from sharegpt4v.dialogue import Completion, Request, TokenLogprob, Turn
from sharegpt4v.engine.stats import EngineStats, Latencies
from sharegpt4v.errors import UserError

ErrorKind = Literal["bad_request", "timeout", "overloaded", "internal", "closed"]
"""Whose fault an error is, for a server's answer: the request's, its time limit's, the load's or ours."""


class EngineError(RuntimeError):
    """One request failed; the others continue. The message is one line that a reject record can hold."""

    kind: ErrorKind = "internal"

    def __init__(self, message: str, kind: ErrorKind | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.kind


class EngineClosed(EngineError):
    """The engine was closed, or its thread ended, before this request was finished."""

    kind: ErrorKind = "closed"


class EngineBusy(EngineError):
    """As many requests wait as the engine's queue takes."""

    kind: ErrorKind = "overloaded"


def as_engine_error(error: Exception) -> EngineError:
    """Returns an error as one of the engine's: of its own kind, a bad request where the user is at fault."""
    if isinstance(error, EngineError):
        return type(error)(one_line(error), error.kind)
    return EngineError(one_line(error), "bad_request" if isinstance(error, UserError) else "internal")


def one_line(error: Exception) -> str:
    """Returns the message in one line for a reject record, with the type of errors that are not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EngineError | UserError) else f"{type(error).__name__}: {text}"


class Handle:
    """A request in progress. Engines call `push` and one of `finish` or `fail`; callers use the rest.

    Every caller gets every piece: several may iterate, await and call `result` at the same time. When the
    last of them leaves before the end, by a break, a cancelled task or an error, the request is cancelled:
    nobody waits for it, and its slot is needed. A `result` that times out leaves it running.
    `async with engine.submit(request) as handle:` cancels what is not done at the end of the block.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self.begun: float | None = None  # when it got its first slot
        self.first_token: float | None = None  # when the engine had it
        self.last_token = 0.0
        self.suspicions = 0  # steps that failed with it and others
        self.cancelled = False
        self.logprobs: list[TokenLogprob] = []  # so far, where asked for: before the text that a token ends
        self._pieces: list[str] = []
        self._completion: Completion | None = None
        self._error: EngineError | None = None
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._readers = 0  # that iterate, await or call `result` now

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

    @property
    def succeeded(self) -> bool:
        """Whether it has an answer that ended by itself or at its limit."""
        return self._completion is not None and self._completion.finish_reason != "cancelled"

    def result(self, timeout: float | None = None) -> Completion:
        """Blocks for at most `timeout` seconds.

        Raises EngineError when this request failed and TimeoutError when it is not finished in time.
        """
        if not self.done():
            with self._reading(cancels=False), self._changed:
                if not self._changed.wait_for(self.done, timeout):
                    raise TimeoutError(f"request {self.request.id!r} is not finished after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of text in order; raises EngineError after the last one when the request failed."""
        seen = 0
        with self._reading():
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

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """Yields as `__iter__` does, without blocking a thread while it waits."""
        async with aclosing(self._fresh()) as several:
            async for fresh in several:
                for piece in fresh:
                    yield piece

    async def chunks(self) -> AsyncGenerator[str, None]:
        """Yields as `async for` does, but all pieces that are there already as one text."""
        async with aclosing(self._fresh()) as several:
            async for fresh in several:
                yield "".join(fresh)

    async def _fresh(self) -> AsyncGenerator[list[str], None]:
        """Yields the pieces since the last time, whenever there are any."""
        seen = 0
        with self._reading(), self._woken() as changed:
            while True:
                changed.clear()
                ended = self.done()  # asked first: a piece may be pushed after the pieces were looked at
                if fresh := self._pieces[seen:]:
                    yield fresh
                    seen += len(fresh)
                elif ended:
                    self.result(0)
                    return
                else:
                    await changed.wait()

    async def __aenter__(self) -> "Handle":
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.done():
            self.cancel()

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
        with self._reading(), self._woken() as changed:
            while not self.done():
                changed.clear()
                if not self.done():
                    await changed.wait()

    @contextmanager
    def _reading(self, cancels: bool = True) -> Iterator[None]:
        """Counts a reader for as long as the block lasts. cancels: if it is the last one and leaves early."""
        with self._changed:
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                if cancels and not self._readers and not self.done():
                    self.cancel()

    @contextmanager
    def _woken(self) -> Iterator[asyncio.Event]:
        """Yields an event of the running loop that is set at every change."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._changed:
            self._waiters.append(waiter)
        try:
            yield waiter[1]
        finally:
            with self._changed:
                self._waiters.remove(waiter)


class Running(Protocol):
    """A request in its slot, as a scheduler needs it."""

    handle: Handle
    tokens: list[int]  # generated so far

    @property
    def position(self) -> int:
        """The position of the last token in the slot."""

    def take(self, token: int) -> Completion | None:
        """Appends a token. Returns the answer once it is complete; raises when the request is at fault."""


class Engine(Protocol):
    """The interface that pipelines and servers may rely on.

    The shape of its images is the model card's `images`.
    """

    model: str  # name@digest, stored beside every caption
    capacity: int  # requests in progress at once; more wait in its queue
    context: int  # tokens of prompt and answer together
    computes_logprobs: bool  # otherwise requests for log probabilities or options fail

    @property
    def last_progress(self) -> float:
        """time.monotonic() of the last token or prefill, or of the last request that found it idle."""

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking.

        Raises EngineClosed once the engine is closed or draining, EngineBusy when its queue is full.
        """

    def count(self, turns: Sequence[Turn]) -> int:
        """Returns the tokens of a prompt, images included. Raises UserError for roles out of order."""

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token of `Completion.logprobs` adds to the text; nothing for a control token.

        Raises UserError from an engine that computes no log probabilities.
        """

    def stats(self) -> EngineStats: ...

    def latencies(self) -> Latencies: ...

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses further requests and waits, `timeout` seconds at most; returns whether all are finished."""

    def close(self) -> None:
        """Fails unfinished requests with EngineClosed and joins the engine's thread."""
