"""From the body of a chat request to the engine's request: roles checked, images decoded, limits applied."""

from dataclasses import dataclass

from serve.errors import refused
from serve.images import data_of, pixels
from serve.limits import Limits
from serve.wire import ChatRequest, ImagePart, Message
from sharegpt4v.dialogue import Image, ImageShape, Request, SamplingParams, Turn

INSTRUCTIONS = ("system", "developer")
"""Roles of the message that may come first, the newer name too: it takes the place of the template's own."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the API must know of a model. id: the name clients give. kind: what it was made for.

    images: the shape that its engine takes. digest: of its weights. created: when it was started, seconds
    since 1970.
    """

    id: str
    kind: str
    images: ImageShape
    digest: str = ""
    created: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A request for one model. given_limit: whether the client itself said how long the answer may be."""

    request: Request
    given_limit: bool = False


def chat_call(body: ChatRequest, info: ModelInfo, limits: Limits, request_id: str) -> Call:
    """Decodes a dialogue. Raises ApiError that names the message at fault. Takes milliseconds an image."""
    _check_roles(body.messages, info)
    images = [part for message in body.messages for part in message.parts if isinstance(part, ImagePart)]
    if len(images) > limits.images:
        raise refused(
            f"{len(images)} images in a dialogue, {limits.images} at most", "messages", "too_many_images"
        )
    limit = body.token_limit
    if limit is not None and limit > limits.tokens:
        raise refused(f"{limit} tokens are too many, {limits.tokens} at most", "max_tokens")
    sampling = body.sampling(limit or limits.tokens, stop=body.stops, logprobs=body.alternatives)
    turns = tuple(_as_turn(message, number, info, limits) for number, message in enumerate(body.messages))
    request = Request(request_id, turns, sampling, limits.request_seconds, stream=bool(body.stream))
    return Call(request, limit is not None)


def caption_call(
    image: Image, prompt: str, sampling: SamplingParams, limits: Limits, request_id: str
) -> Call:
    """Makes the request for one caption; each may go to another replica."""
    request = Request(request_id, (Turn("user", prompt, (image,)),), sampling, limits.request_seconds)
    return Call(request, given_limit=True)


def _check_roles(messages: list[Message], info: ModelInfo) -> None:
    first = 1 if messages[0].role in INSTRUCTIONS else 0
    if first and info.kind == "captioner":
        raise refused(
            f"a captioner's template has no place for a message of the role {messages[0].role}",
            "messages.0.role",
            "unsupported_value",
        )
    for number, message in enumerate(messages[first:], first):
        if message.role in INSTRUCTIONS:
            raise refused(
                f"a message of the role {message.role} comes first, and there is one at most",
                f"messages.{number}.role",
            )
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if message.role != expected:
            raise refused(
                f"the user begins and the assistant alternates: message {number} must be the {expected}'s",
                f"messages.{number}.role",
            )
    if messages[-1].role != "user":
        raise refused("the last message must be the user's", "messages")


def _as_turn(message: Message, number: int, info: ModelInfo, limits: Limits) -> Turn:
    images = []
    for place, part in enumerate(message.parts):
        if isinstance(part, ImagePart):
            where = f"messages.{number}.content.{place}.image_url"
            if message.role != "user":
                raise refused(f"only a user's message has images, not the {message.role}'s", where)
            data = data_of(part.image_url.url, where)
            images.append(pixels(data, info.images, limits, where))
    text = message.text
    if not text and not images:
        raise refused("this message is empty", f"messages.{number}.content")
    role = "system" if message.role == "developer" else message.role
    return Turn(role, text, tuple(images))
