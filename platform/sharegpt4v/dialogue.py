"""The data that models, engines, servers and scorers exchange: images, turns, requests and completions."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, TypeAlias

from sharegpt4v.errors import UserError

if TYPE_CHECKING:  # configurations import this module, and `--help` must not load numpy
    import numpy as np
    import numpy.typing as npt

ImageProtocol = Literal["pad", "crop", "squash"]
"""How an image of any shape is made the model's square, implemented in images/protocols.py."""

EngineName = Literal["torch", "vllm", "transformers", "fake"]
"""The engines that engine/build.py can build."""

Image: TypeAlias = "npt.NDArray[np.uint8]"
"""(H, W, 3) uint8 RGB, upright, in the shape that the engine takes: SquareImages or WholeImages."""


@dataclass(frozen=True, slots=True)
class SquareImages:
    """An engine takes images of (side, side, 3) pixels, made square by the protocol."""

    side: int
    protocol: ImageProtocol


@dataclass(frozen=True, slots=True)
class WholeImages:
    """An engine takes images of any shape; those of more than max_pixels are scaled down to as many."""

    max_pixels: int

    @property
    def side(self) -> int:
        """The side of a square of the most pixels."""
        return math.isqrt(self.max_pixels)


ImageShape: TypeAlias = SquareImages | WholeImages
"""What an engine takes; a model card says it before a weight is loaded."""

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a number: at least `least`, or greater than `above`, and at most `most`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def contain(self, value: float) -> bool:
        """Returns whether a value is within the bounds; NaN never is."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        if self.above is not None:
            return f"above {self.above:g}" + ("" if self.most is None else f", {self.most:g} at most")
        return f"{self.least:g} or more" if self.most is None else f"{self.least:g} to {self.most:g}"


SAMPLING_BOUNDS: Mapping[str, Bounds] = {
    "max_new_tokens": Bounds(least=1),
    "min_new_tokens": Bounds(least=0),  # and at most max_new_tokens
    "temperature": Bounds(least=0, most=100),
    "top_p": Bounds(above=0, most=1),
    "top_k": Bounds(least=0),
    "repetition_penalty": Bounds(above=0, most=100),
}
"""Bounds of SamplingParams, and of every configuration that is converted to one."""

_WHOLE = ("max_new_tokens", "min_new_tokens", "top_k")


MOST_LOGPROBS = 20
"""Most alternatives of a token whose log probabilities may be asked for, as in OpenAI's API."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is decoded, within SAMPLING_BOUNDS.

    temperature 0 is greedy and ignores top_p and top_k. top_p: share of probability that is sampled from,
    above 0 and at most 1 as in transformers and vLLM. repetition_penalty counts generated tokens only,
    never the prompt's (as the released captioner does, reference: 1.5). seed None derives one from the
    request's id, so that the same request always samples the same answer.
    stop: texts that end the answer and are not part of it. min_new_tokens: tokens before any end token.
    logprobs: with each token also its log probability and those of this many likeliest tokens, None for none.
    Raises UserError for a value out of bounds.
    """

    max_new_tokens: int = 500  # the release's length cap
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, bounds in SAMPLING_BOUNDS.items():
            value = getattr(self, name)
            is_number = isinstance(value, Integral if name in _WHOLE else Real)
            if not is_number:
                number = "a whole number" if name in _WHOLE else "a number"
                raise UserError(f"{value!r} is refused: expected {number}, {bounds}", field=name)
            if not bounds.contain(value):
                raise UserError(f"{value!r} is refused: expected {bounds}", field=name)
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise UserError(f"{self.seed!r} is refused: expected a whole number, or none", field="seed")
        if self.logprobs is not None and not (
            isinstance(self.logprobs, Integral) and 0 <= self.logprobs <= MOST_LOGPROBS
        ):
            raise UserError(
                f"{self.logprobs!r} is refused: expected 0 to {MOST_LOGPROBS}, or none", field="logprobs"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"{self.min_new_tokens} is refused: `max_new_tokens` is {self.max_new_tokens}",
                field="min_new_tokens",
            )
        texts = self.stop if isinstance(self.stop, tuple | list) else (None,)
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{self.stop!r} is refused: expected texts of a letter at least", field="stop")


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One turn of a dialogue; control strings in its text are treated as plain text.

    role: a system turn comes first, if at all, and takes the place of the template's own system line.
    images: those of a user's turn, in order; templates put them before its text. Raises UserError for
    another's turn with images, a text that is none, and images that are no pixels.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UserError(f"a turn's text is {self.text!r}: give a text, an empty one for images alone")
        for image in self.images:
            if not hasattr(image, "shape") or not hasattr(image, "dtype"):
                raise UserError(
                    f"a turn's image is {str(image)[:80]!r}: give its pixels, an array (H, W, 3) of uint8"
                )
        if self.images and self.role != "user":
            raise UserError(
                f"a turn of the {self.role} has {len(self.images)} images, and only a user's may have any: "
                "move them to the question"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One dialogue to be answered.

    timeout: seconds from submit after which it fails. stream: pieces are pushed while they are generated;
    otherwise the whole text is one piece. options: texts to choose from: nothing is generated, the answer is
    the likeliest of them, and the completion has the log likelihood of each.
    """

    id: str
    turns: tuple[Turn, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout: float | None = None
    stream: bool = False
    options: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's id and natural log probability by the model alone: before temperature, penalty and cuts.

    top: ids and log probabilities of the likeliest tokens, best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class OptionScore:
    """The sum of the log probabilities of an option's tokens behind the prompt, without an end token."""

    logprob: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    text: without end token. tokens: generated tokens, end token included; token_ids: they themselves.
    prompt_tokens: those of the dialogue, images included; cached_tokens: those of them whose keys and values
    were there already. queued_seconds: from submit to its slot; first_token_seconds: from submit to that.
    logprobs: of each token, where asked for. options: of each of the request's options, in their order.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = field(default=(), compare=False)
    prompt_tokens: int = field(default=0, compare=False)
    cached_tokens: int = field(default=0, compare=False)
    queued_seconds: float = field(default=0.0, compare=False)
    first_token_seconds: float = field(default=0.0, compare=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), compare=False)
    options: tuple[OptionScore, ...] = field(default=(), compare=False)


def sampling_seed(request_id: str, attempt: int) -> int:
    """Returns a 63-bit hash of id and attempt, so that a resumed run samples the same answers."""
    digest = hashlib.blake2b(f"{attempt}:{request_id}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1
