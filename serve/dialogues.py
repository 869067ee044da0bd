"""From the body of a chat request to the engine's request: roles checked, images decoded, limits applied."""

from dataclasses import dataclass

from serve.errors import refused
from serve.images import data_of, pixels
from serve.limits import Limits
from serve.wire import ChatRequest, ImagePart, Message, TextPart
from sharegpt4v.dialogue import Image, ImageProtocol, Request, SamplingParams, Turn


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the API must know of a model. id: the name clients give. kind: what it was made for.

    image_size: pixels a side. digest: of its weights. created: seconds since 1970 when it was started.
    """

    id: str
    kind: str
    image_size: int
    protocol: ImageProtocol
    digest: str = ""
    created: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A request for one model. given_limit: whether the client itself said how long the answer may be."""

    request: Request
    given_limit: bool = False


def chat_call(body: ChatRequest, info: ModelInfo, limits: Limits, request_id: str) -> Call:
    """Decodes a dialogue. Raises ApiError that names the message at fault. Takes milliseconds an image."""
    _check_roles(body.messages)
    images = [part for message in body.messages for part in _parts(message) if isinstance(part, ImagePart)]
    if len(images) > limits.images:
        raise refused(
            f"{len(images)} images in a dialogue, {limits.images} at most", "messages", "too_many_images"
        )
    limit = body.token_limit
    if limit is not None and limit > limits.tokens:
        raise refused(f"{limit} tokens are too many, {limits.tokens} at most", "max_tokens")
    sampling = body.sampling(limit or limits.tokens, stop=body.stops)
    turns = tuple(_as_turn(message, number, info, limits) for number, message in enumerate(body.messages))
    request = Request(request_id, turns, sampling, limits.request_seconds, stream=bool(body.stream))
    return Call(request, limit is not None)


def caption_call(
    image: Image, prompt: str, sampling: SamplingParams, limits: Limits, request_id: str
) -> Call:
    """Makes the request for one caption; each may go to another replica."""
    request = Request(request_id, (Turn("user", prompt, (image,)),), sampling, limits.request_seconds)
    return Call(request, given_limit=True)


def _check_roles(messages: list[Message]) -> None:
    for number, message in enumerate(messages):
        if message.role in ("system", "developer"):
            raise refused(
                f"messages of the role {message.role} are not supported by this model",
                f"messages.{number}.role",
                "unsupported_value",
            )
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise refused(
                f"a dialogue begins with the user and alternates: message {number} must be the {expected}'s",
                f"messages.{number}.role",
            )
    if messages[-1].role != "user":
        raise refused("the last message must be the user's", "messages")


def _parts(message: Message) -> list[TextPart | ImagePart]:
    if isinstance(message.content, str):
        return [TextPart(type="text", text=message.content)]
    return message.content


def _as_turn(message: Message, number: int, info: ModelInfo, limits: Limits) -> Turn:
    parts, images = _parts(message), []
    for place, part in enumerate(parts):
        if isinstance(part, ImagePart):
            where = f"messages.{number}.content.{place}.image_url"
            if message.role == "assistant":
                raise refused("an assistant's message has no images", where)
            data = data_of(part.image_url.url, where)
            images.append(pixels(data, info.image_size, info.protocol, limits, where))
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if not text and not images:
        raise refused("this message is empty", f"messages.{number}.content")
    assert message.role in ("user", "assistant")
    return Turn(message.role, text, tuple(images))
