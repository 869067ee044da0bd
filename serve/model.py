"""One model behind the API: an engine that answers calls as streams of events. Knows neither HTTP nor Ray."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Protocol

from serve.dialogues import Call, ModelInfo
from serve.errors import ApiError, as_api_error, refused
from serve.logprobs import Piece, entries
from sharegpt4v.dialogue import Completion, Request, SquareImages
from sharegpt4v.engine.handle import Engine, EngineError, Handle
from sharegpt4v.engine.stats import EngineStats, Latencies

log = logging.getLogger("serve.model")

Event = str | Piece | Completion | ApiError
"""What a call yields: an empty text once it is admitted, texts, and at the end the completion or an error.

Pieces where log probabilities were asked for, in place of texts; without a stream one with them all.
"""

_SHORT = 4_000
"""Characters of a dialogue that are counted at once; longer ones would hold up other streams, as images do
whose tokens depend on their shape."""


_GRACE_SECONDS = 1.0
"""After a request's time limit, within which a working engine has ended it itself."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one replica for metrics. cached_tokens: prompt tokens that needed no prefill, so far."""

    model: str
    replica: str
    stats: EngineStats
    latencies: Latencies
    cached_tokens: int = 0
    prompt_tokens: int = 0
    at: float = 0.0  # time.time()


class Backend(Protocol):
    """A model that the API can call, in this process or on a cluster."""

    info: ModelInfo

    def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yields events; never raises for a request's own fault. Closing it frees the slot."""

    async def snapshots(self) -> list[Snapshot]:
        """Returns the state of every replica."""

    async def ready(self) -> bool:
        """Returns whether requests would be answered now."""


class ServedModel:
    """An engine as a Backend. hang_seconds: without a token for so long while requests run, it is hung."""

    def __init__(
        self, engine: Engine, info: ModelInfo, hang_seconds: float = 120.0, replica: str = "0"
    ) -> None:
        self.engine, self.info = engine, info
        self._hang_seconds, self._replica = hang_seconds, replica
        self._cached_tokens = self._prompt_tokens = 0
        self._in_progress = 0

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yields events; never raises for a request's own fault. Closing it frees the slot."""
        request_id = call.request.id
        try:
            if call.request.sampling.logprobs is not None and not self.engine.computes_logprobs:
                raise refused("this model's engine computes no log probabilities", "logprobs")
            request, tokens = await self._fitted(call)
            handle = self.engine.submit(request)
        except Exception as error:
            yield as_api_error(error, request_id)
            return
        async with handle:
            self._in_progress += 1
            late = _fail_late(handle)
            try:
                yield ""
                if call.request.sampling.logprobs is not None:
                    async for piece in self._pieces(handle):
                        yield piece
                elif call.request.stream:
                    async for text in handle.chunks():
                        yield text
                completion = await handle
            except Exception as error:
                yield as_api_error(error, request_id)
                return
            finally:
                self._in_progress -= 1
                late.cancel()
            self._cached_tokens += completion.cached_tokens
            self._prompt_tokens += tokens
            yield replace(completion, prompt_tokens=tokens)

    async def _pieces(self, handle: Handle) -> AsyncGenerator[Piece, None]:
        """Yields the texts with what the tokens since the last are; one piece for a whole answer."""
        seen = 0
        if handle.request.stream:
            async for text in handle.chunks():
                fresh = handle.logprobs[seen:]
                seen += len(fresh)
                yield Piece(text, entries(fresh, self.engine.token_bytes))
        completion = await handle
        rest = completion.logprobs[seen:]
        if rest or not handle.request.stream:
            yield Piece("", entries(rest, self.engine.token_bytes))

    async def _fitted(self, call: Call) -> tuple[Request, int]:
        """Returns the engine's request and the prompt's tokens. Raises ApiError beyond the context."""
        request, engine = call.request, self.engine
        short = sum(len(turn.text) for turn in request.turns) <= _SHORT
        if short and isinstance(self.info.images, SquareImages):
            tokens = engine.count(request.turns)
        else:
            tokens = await asyncio.to_thread(engine.count, request.turns)
        room = engine.context - tokens
        wanted = request.sampling.max_new_tokens if call.given_limit else 1
        if wanted > room:
            raise refused(
                f"the context is {engine.context} tokens; the dialogue has {tokens}, and its answer may have "
                f"{wanted}: shorten the one or the other",
                "messages",
                "context_length_exceeded",
            )
        if request.sampling.max_new_tokens <= room:
            return request, tokens
        return replace(request, sampling=replace(request.sampling, max_new_tokens=room)), tokens

    def hung(self) -> bool:
        """Returns whether requests run and none has got a token for `hang_seconds`."""
        stats = self.engine.stats()
        # The engine counts no request that is being prefilled, neither as running nor as queued.
        busy = self._in_progress or stats.running or stats.queued
        return bool(busy) and time.monotonic() - self.engine.last_progress > self._hang_seconds

    async def ready(self) -> bool:
        return not self.hung()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            self.info.id,
            self._replica,
            self.engine.stats(),
            self.engine.latencies(),
            self._cached_tokens,
            self._prompt_tokens,
            time.time(),
        )

    async def snapshots(self) -> list[Snapshot]:
        return [self.snapshot()]


def _fail_late(handle: Handle) -> asyncio.TimerHandle:
    """Fails a request that a hung engine does not end at its time limit; returns the timer."""

    def fail() -> None:
        handle.fail(EngineError("not finished within its time limit by an engine that hangs", "timeout"))
        handle.cancel()

    seconds = handle.request.timeout or float(2**20)
    return asyncio.get_running_loop().call_later(seconds + _GRACE_SECONDS, fail)
