"""POST /v1/chat/completions: one dialogue in, one answer out, whole or as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve.answers import ChatChunks, chat_completion, error_event
from serve.dialogues import Call, chat_call
from serve.errors import ApiError, internal
from serve.limits import Limits
from serve.logprobs import Entry, Piece
from serve.metrics import ApiMetrics
from serve.model import Backend, Event
from serve.wire import ChatRequest
from sharegpt4v.dialogue import Completion


async def prepare_call(body: ChatRequest, backend: Backend, limits: Limits, request_id: str) -> Call:
    """Decodes a dialogue, in a thread when it has images. Raises ApiError."""
    texts = all(isinstance(message.content, str) for message in body.messages)
    if texts:
        return chat_call(body, backend.info, limits, request_id)
    return await asyncio.to_thread(chat_call, body, backend.info, limits, request_id)


async def whole_answer(events: AsyncGenerator[Event, None]) -> tuple[Completion, list[Entry] | None]:
    """Returns the completion at the end of a call's events, with log probabilities if it has any.

    Raises the ApiError that is there instead.
    """
    logprobs: list[Entry] | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Piece):
                logprobs = (logprobs or []) + event.logprobs
            if isinstance(event, Completion):
                return event, logprobs
    raise internal()


async def admitted(events: AsyncGenerator[Event, None]) -> None:
    """Waits until the model has taken the call. Raises ApiError: the status is not sent yet."""
    try:
        first = await anext(events, None)
    except BaseException:
        await events.aclose()
        raise
    if isinstance(first, ApiError) or first is None:
        await events.aclose()
        raise first or internal()


async def sse(
    events: AsyncGenerator[Event, None], chunks: ChatChunks, line: Any, metrics: ApiMetrics
) -> AsyncGenerator[bytes, None]:
    """Yields a call's events as server-sent events; closing it closes the call."""
    first = True
    async with aclosing(events):
        yield chunks.role()
        async for event in events:
            if isinstance(event, str | Piece):
                if first and event:
                    note_first_token(line, metrics)
                    first = False
                if isinstance(event, Piece):
                    yield chunks.piece(event)
                elif event:
                    yield chunks.text(event)
            elif isinstance(event, Completion):
                note_completion(line, event)
                yield chunks.end(event)
                return
            else:
                line.code = event.code
                yield error_event(event)
                return
    line.code = "internal_error"
    yield error_event(internal())


def note_first_token(line: Any, metrics: ApiMetrics) -> None:
    seconds = time.monotonic() - line.body_read
    line.more["first_token_seconds"] = round(seconds, 4)
    metrics.first_token.labels(line.more["model"]).observe(seconds)


def note_completion(line: Any, completion: Completion) -> None:
    line.texts["answer"] = completion.text
    line.more |= {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
    }


def chat_body(request_id: str, model: str, completion: Completion, logprobs: list[Entry] | None) -> bytes:
    return json.dumps(chat_completion(request_id, model, completion, logprobs)).encode()
