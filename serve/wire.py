"""What clients send: the bodies of the API as pydantic models, with OpenAI's names.

An unknown field is refused: to leave out what a client asked for would change its answer silently. Fields of
OpenAI that cannot change an answer here are taken and have no effect.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from serve.errors import ApiError, refused
from sharegpt4v.dialogue import MOST_LOGPROBS, SamplingParams

NO_EFFECT = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "verbosity", "prediction"),
)
"""Fields of OpenAI that clients may send and that change no answer here."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions"), (None, [])),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "n": (None, 1),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
    **dict.fromkeys(("audio", "reasoning_effort", "web_search_options"), (None,)),
}
"""Fields of OpenAI that are not served, and the values that ask for nothing."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Body):
    """Holds a part of a text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    """Holds an image as a data URL; `detail` has no effect, images are always brought to the model's size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Body):
    """Holds an image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _kind_of_content(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts")], Discriminator(_kind_of_content)
]
"""Chosen by a function: pydantic would report the errors of both kinds."""


class Message(_Body):
    """Holds one message; its content is a text or a list of parts, images in a user's alone."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    name: str | None = None
    refusal: None = None

    @property
    def parts(self) -> list[Part]:
        """The parts of the content; a plain text is one."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The content's texts, a line each."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))


class StreamOptions(_Body):
    """Holds options of a stream. include_usage: whether its last chunk has the tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Sampling(_Body):
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    def sampling(self, max_new_tokens: int, **defaults: Any) -> SamplingParams:
        """Returns how the answer is decoded; fields that were not given have these defaults."""
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(max_new_tokens=max_new_tokens, **defaults | given)


class ChatRequest(_Sampling):
    """Holds the body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer, four at most as with OpenAI. Raises ApiError."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(0 < len(stop) <= 1000 for stop in stops):
            raise refused("give at most 4 texts, of 1 to 1000 letters each", "stop")
        return tuple(stops)

    @property
    def alternatives(self) -> int | None:
        """The number of likeliest tokens to give with each token, None for no log probabilities.

        Raises ApiError for alternatives without log probabilities.
        """
        if self.top_logprobs and not self.logprobs:
            raise refused("needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """The most tokens of the answer, by either name. Raises ApiError when the two differ."""
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refused("differs from max_completion_tokens: give one of the two", "max_tokens")
        return next(iter(both), None)


class CaptionRequest(_Sampling):
    """Holds the JSON body of POST /v1/captions: data URLs of one image or of several, and another prompt."""

    image: str | None = None
    images: list[str] | None = None
    prompt: str | None = Field(None, max_length=10_000)


B = TypeVar("B", ChatRequest, CaptionRequest)


def parse(kind: type[B], body: bytes) -> B:
    """Reads a JSON body. Raises ApiError that names the field at fault and never repeats what was sent."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    extra: list[Any] = [item for item in found if item["type"] == "extra_forbidden"]
    others: list[Any] = [item for item in found if item["type"] != "extra_forbidden"]
    if not others and all(_asks_for_nothing(item) for item in extra):
        dropped = {str(item["loc"][0]) for item in extra}
        return kind.model_validate_json(_without(body, dropped))
    raise _refusal([*others, *(item for item in extra if not _asks_for_nothing(item))][0])


def _asks_for_nothing(item: Any) -> bool:
    name = item["loc"][0]
    if len(item["loc"]) != 1:
        return False
    given = item["input"]
    # True is 1 in Python, and `"n": true` is no number.
    return name in NO_EFFECT or any(
        given == value and isinstance(given, bool) == isinstance(value, bool)
        for value in UNSUPPORTED.get(str(name), ())
    )


def _without(body: bytes, names: set[str]) -> bytes:
    kept = {name: value for name, value in json.loads(body).items() if name not in names}
    return json.dumps(kept).encode()


def _refusal(item: Any) -> ApiError:
    where = _where(item["loc"])
    if item["type"] == "json_invalid":
        return refused("the body is not JSON", code="invalid_json")
    if item["type"] == "extra_forbidden":
        if where in UNSUPPORTED:
            return refused(f"{where} is not supported by this server", where, "unsupported_parameter")
        return refused(f"unknown field {where[:80]}", where[:80], "unknown_parameter")
    if item["type"] == "missing":
        return refused(f"{where} is required", where, "missing_required_parameter")
    return refused(f"{where or 'the body'}: {item['msg'].lower()}", where or None)


def _where(loc: tuple[str | int, ...]) -> str:
    """Returns the dotted path of a field, without the names of kinds that pydantic puts before it."""
    kept: list[str] = []
    for part in map(str, loc):
        kind = kept[-1:] == ["content"] and part in ("text", "parts")
        if not kind and kept[-1:] != [part]:
            kept.append(part)
    return ".".join(kept)
