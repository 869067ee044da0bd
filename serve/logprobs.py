"""Log probabilities of an answer's tokens, in OpenAI's shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sharegpt4v.dialogue import TokenLogprob

Entry = dict[str, Any]
"""A token as OpenAI shows it: token, logprob, bytes, and top_logprobs, the likeliest tokens in its place."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a streamed answer with the tokens since the last one; text may still be held back."""

    text: str
    logprobs: list[Entry]


def entries(logprobs: Sequence[TokenLogprob], token_bytes: Callable[[int], bytes]) -> list[Entry]:
    """Returns an entry of each token; control tokens, the end token among them, are no part of the text."""
    found = []
    for one in logprobs:
        if text := token_bytes(one.token):
            top = [_entry(token_bytes(token), logprob) for token, logprob in one.top]
            found.append(_entry(text, one.logprob) | {"top_logprobs": top})
    return found


def choice_logprobs(content: list[Entry] | None) -> Entry | None:
    """Returns the field `logprobs` of a choice; None where none were asked for."""
    return None if content is None else {"content": content, "refusal": None}


def _entry(text: bytes, logprob: float) -> Entry:
    # JSON knows no infinity: OpenAI's own stand for a token that is out of the question.
    return {"token": text.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(text)}
