"""What the API sends: OpenAI's completions, and chunks of server-sent events."""

import json
import time
from typing import Any

from serve.dialogues import ModelInfo
from serve.errors import ApiError
from serve.logprobs import Entry, Piece, choice_logprobs
from sharegpt4v.dialogue import Completion, SquareImages

DONE = b"data: [DONE]\n\n"


def usage(completion: Completion) -> dict[str, Any]:
    """Returns the tokens of prompt and answer."""
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.tokens,
        "total_tokens": completion.prompt_tokens + completion.tokens,
        "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
    }


def chat_completion(
    request_id: str, model: str, completion: Completion, logprobs: list[Entry] | None
) -> dict[str, Any]:
    """Returns the body of an answer that is not streamed. logprobs: of its tokens, None if not asked for."""
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": choice_logprobs(logprobs),
        "finish_reason": completion.finish_reason,
    }
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage(completion),
    }


class ChatChunks:
    """Makes the events of one streamed answer; all but the text is encoded once."""

    def __init__(self, request_id: str, model: str, with_usage: bool) -> None:
        self._with_usage = with_usage
        self._head = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        before, after = self._chunk({"content": "\0"}).decode().split('"\\u0000"')
        self._before, self._after = before.encode(), after.encode()

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: list[Entry] | None = None
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": choice_logprobs(logprobs),
            "finish_reason": finish_reason,
        }
        extra = {"usage": None} if self._with_usage else {}
        return _event({**self._head, "choices": [choice], **extra})

    def role(self) -> bytes:
        """Returns the first event, sent once the request is admitted."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        return self._before + json.dumps(text).encode() + self._after

    def piece(self, piece: Piece) -> bytes:
        """Returns the event of a text with its tokens' log probabilities."""
        return self._chunk({"content": piece.text}, logprobs=piece.logprobs)

    def end(self, completion: Completion) -> bytes:
        """Returns the last events: why the answer ended, the usage if it was asked for, and DONE."""
        last = self._chunk({}, completion.finish_reason)
        if self._with_usage:
            last += _event({**self._head, "choices": [], "usage": usage(completion)})
        return last + DONE


def error_event(error: ApiError) -> bytes:
    """Returns an error within a stream; OpenAI's clients raise it."""
    return _event(error.body())


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def model_object(info: ModelInfo) -> dict[str, Any]:
    """Returns a model as GET /v1/models lists it; kind, digest and the size of images are ours."""
    shape = info.images
    if isinstance(shape, SquareImages):
        size = {"image_size": shape.side}
    else:
        size = {"max_pixels": shape.max_pixels}
    return {
        "id": info.id,
        "object": "model",
        "created": info.created,
        "owned_by": "sharegpt4v",
        "kind": info.kind,
        "digest": info.digest,
        **size,
    }
