"""The one engine interface that captioning and chat share.

`submit(request) -> Handle` may be called from any thread. The engine owns one thread of its own that
does the work; a handle gives the finished completion, streams it piece by piece, or cancels it, and
can be awaited from asyncio. Which engine stands behind it (torch, vllm, fake) is a configuration.
"""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
"""(H, W, 3) uint8 RGB at the model's own size; the device normalises."""

FinishReason = Literal["stop", "length", "cancelled"]


class EngineError(RuntimeError):
    """One request failed; the others go on. The message is one line fit for a reject record."""


class EngineClosed(EngineError):
    """The engine was closed, or its thread died, before this request was finished."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is decoded.

    temperature 0 is greedy and ignores top_p and top_k. repetition_penalty counts generated tokens
    only, never the prompt's (the released captioner does the same, reference: 1.5). seed None draws
    one from the request's id, so that the same request always samples the same answer.
    """

    max_new_tokens: int = 500  # the release's length cap
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue; the text is plain text whatever control strings it holds."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One dialogue to be answered. Images belong to the first user turn, in order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Completion:
    """text: the answer without end token. tokens: generated tokens, end token included."""

    text: str
    tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started; seconds are those its thread spent inside the model."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    slot_steps: int = 0  # decode steps x capacity
    live_steps: int = 0  # decode steps x slots that still generated


class Handle:
    """A request under way. Engines call `push` and one of `finish` or `fail`; callers use the rest."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        # Held until the request has ended: a bare lock costs a hundredth of a threading.Event, and a
        # pipeline makes one for each of a million images.
        self._unfinished = threading.Lock()
        self._unfinished.acquire()
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._completion: Completion | None = None
        self._error: EngineError | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Asks the engine to stop; the completion then ends with finish_reason cancelled."""
        self.cancelled = True

    def done(self) -> bool:
        return self._completion is not None or self._error is not None

    def result(self, timeout: float | None = None) -> Completion:
        """Blocks for at most `timeout` seconds.

        Raises EngineError when this request failed and TimeoutError when it is not finished in time.
        """
        if not self.done():
            if not self._unfinished.acquire(timeout=-1 if timeout is None else timeout):
                raise TimeoutError(f"request {self.request.id!r} is not finished after {timeout} s")
            self._unfinished.release()  # for the next one who waits
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def __iter__(self) -> Iterator[str]:
        """Pieces of text in order; raises EngineError after the last one when the request failed."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.result(0)

    def __await__(self) -> Generator[Any, None, Completion]:
        yield from self._finished().__await__()
        return self.result(0)

    async def __aiter__(self) -> AsyncIterator[str]:
        pieces = iter(self)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def push(self, piece: str) -> None:
        self._pieces.put(piece)

    def finish(self, completion: Completion) -> None:
        self._completion = completion
        self._end()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self._end()

    def _end(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        self._unfinished.release()
        self._pieces.put(None)
        for loop, future in waiters:
            loop.call_soon_threadsafe(_resolve, future)

    async def _finished(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.done():
                return
            future: asyncio.Future[None] = loop.create_future()
            self._waiters.append((loop, future))
        await future


class Engine(Protocol):
    """What pipelines and servers may rely on."""

    model: str  # name@digest, stored beside every caption
    image_size: int  # pixels; images are handed over as (image_size, image_size, 3)
    capacity: int  # requests it works on at once; more wait in its queue

    def submit(self, request: Request) -> Handle:
        """Never blocks. Raises EngineClosed once the engine is closed."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Fails what is unfinished with EngineClosed and joins the engine's thread."""


def sampling_seed(request_id: str, attempt: int) -> int:
    """63-bit seed = hash(id, attempt): a resumed run samples what an uninterrupted one would have."""
    digest = hashlib.blake2b(f"{attempt}:{request_id}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():  # the awaiting task may have been cancelled meanwhile
        future.set_result(None)
