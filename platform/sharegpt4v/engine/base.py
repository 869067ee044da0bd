"""The one engine interface that captioning and chat share.

`submit(request) -> Handle` may be called from any thread. The engine owns one thread of its own that
does the work; a handle gives the finished completion, streams it piece by piece, or cancels it, and
can be awaited from asyncio. Which engine stands behind it (torch, vllm, fake) is a configuration.
"""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from sharegpt4v.errors import UserError

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
    stop: texts that end the answer and are not part of it. min_new_tokens: no end token before them.
    Raises UserError for a value that no decoding can follow.
    """

    max_new_tokens: int = 500  # the release's length cap
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Each is asked for so that NaN does not pass either.
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"0 to max_new_tokens, which is {self.max_new_tokens}",
            ),
            "temperature": (0 <= self.temperature <= 100, "0, which is greedy, to 100"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1"),
            "top_k": (self.top_k >= 0, "0, which is no limit, or more"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0, 100 at most"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "texts of a letter at least"),
        }
        for name, (holds, expected) in wanted.items():
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue; the text is plain text whatever control strings it holds."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One dialogue to be answered. Images belong to the first user turn, in order.

    timeout: seconds from submit after which it fails. stream: pieces come while they are generated; otherwise
    the whole text is one piece.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout: float | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """text: the answer without end token. tokens: generated tokens, end token included."""

    text: str
    tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started; seconds are those its thread spent inside the model."""

    requests: int = 0  # finished
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    slot_steps: int = 0  # decode steps x slots
    live_steps: int = 0  # decode steps x slots that still generated
    begun: int = 0  # requests whose first token has come
    ttft_seconds: float = 0.0  # from submit to first token, summed over the begun
    slots: int = 0
    running: int = field(default=0, compare=False)
    queued: int = field(default=0, compare=False)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Of two engines together; rates stay those of one engine on average."""
        return EngineStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def slot_use(self) -> float:
        """Share of slots that generated, over all decode steps."""
        return self.live_steps / self.slot_steps if self.slot_steps else 0.0

    @property
    def mean_ttft(self) -> float:
        """Seconds from submit to the first token."""
        return self.ttft_seconds / self.begun if self.begun else 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens/s while prefilling."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens/s while decoding; the first token of each answer belongs to its prefill."""
        return self.live_steps / self.decode_seconds if self.decode_seconds else 0.0


class Handle:
    """A request under way. Engines call `push` and one of `finish` or `fail`; callers use the rest.

    Every caller sees every piece: a handle may be iterated, awaited and asked for its result at once.
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
        """Pieces of text in order; raises EngineError after the last one when the request failed."""
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
        """As `__iter__`, without holding a thread while it waits."""
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
        """What was pushed so far."""
        return "".join(self._pieces)

    def push(self, piece: str) -> None:
        if not piece:
            return
        with self._changed:
            self._pieces.append(piece)
            self._notify()

    def finish(self, completion: Completion) -> None:
        """The end of the request; what an engine says of it afterwards is not heard."""
        with self._changed:
            if not self.done():
                self._completion = completion
                self._notify()

    def fail(self, error: EngineError) -> None:
        """As `finish`, for a request that failed."""
        with self._changed:
            if not self.done():
                self._error = error
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, changed in self._waiters:
            # A loop that was closed meanwhile has nobody left who waits; the engine must not die of it.
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
