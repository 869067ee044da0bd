"""Encodes dialogues as token ids and labels, for training and for every engine, without loading weights.

Ids and labels are built segment by segment: nothing is searched for in finished text, and control strings
that a user writes remain plain text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from sharegpt4v.dialogue import Turn
from sharegpt4v.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100
"""Label of a position without loss, the default of torch's cross entropy."""

_TEXTS_KEPT = 64
"""Encoded texts that a template keeps: captioning asks the same question of every image."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System line of the vicuna_v1 template."""


@dataclass(frozen=True, slots=True)
class TrainingIds:
    """input_ids: (T,), an image as image_tokens times its id. labels: (T,), IGNORE_INDEX but for answers."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer that a model is trained on: its text, and the control tokens that end it."""

    text: str
    end: tuple[int, ...] = ()


_Part = str | int | _Answer | None
"""A part of a dialogue: text, a control token, an answer, or None for an image."""


class _Run(NamedTuple):
    ids: list[int]
    kind: Literal["prompt", "image", "answer"]


class Template(ABC):
    """Turns dialogues into ids. Behind a system turn, if any, user and assistant alternate, the user first.

    image_token_id: the id at an image's positions. image_tokens: the number of positions of one image.
    Raises UserError for a tokenizer that lacks one of the template's control tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", image_token_id: int, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self._encoded: dict[str, list[int]] = {}
        self._bos = self._control(tokenizer.bos_token or "<s>")

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the ids (T,) after which an answer is generated; a prompt ends with the user.

        Followed by the answer's ids they are the input_ids of `example`, so that inference matches training.
        Raises UserError for other roles.
        """
        _check_roles(turns, last="user")
        return [token for run in self._runs(turns) for token in run.ids]

    def segments(self, turns: Sequence[Turn]) -> list[list[int]]:
        """Returns a prompt's ids without its images, split at their positions: images + 1 lists.

        Raises UserError as `prompt` does.
        """
        _check_roles(turns, last="user")
        segments: list[list[int]] = [[]]
        for run in self._runs(turns):
            if run.kind == "image":
                segments.append([])
            else:
                segments[-1] += run.ids
        return segments

    def example(self, turns: Sequence[Turn]) -> TrainingIds:
        """Returns ids and labels of a dialogue to train on: all answers and their end tokens have labels.

        The dialogue ends with the assistant. Raises UserError for other roles.
        """
        _check_roles(turns, last="assistant")
        runs = list(self._runs(turns))
        return TrainingIds(
            [token for run in runs for token in run.ids],
            [token if run.kind == "answer" else IGNORE_INDEX for run in runs for token in run.ids],
        )

    def continuation(self, turns: Sequence[Turn], text: str) -> list[int]:
        """Returns the ids of an answer behind a prompt, without its end. Raises UserError as `prompt`."""
        _check_roles(turns, last="user")
        *_, run = (run for run in self._runs([*turns, Turn("assistant", text)]) if run.kind == "answer")
        return run.ids[: len(run.ids) - len(self._answer(text).end)]

    def _opening(self, system: str | None) -> str:
        """Returns the text before the first question. Raises UserError where a system turn has no place."""
        if system is not None:
            raise UserError("this model's template has no place for a system turn: leave it out")
        return ""

    @abstractmethod
    def _question(self, turn: Turn, first: bool) -> list[_Part]:
        """Returns the parts of a user's turn, up to the start of the answer."""

    @abstractmethod
    def _answer(self, text: str) -> _Answer:
        """Returns the text and end tokens of an assistant's turn."""

    def _runs(self, turns: Sequence[Turn]) -> Iterator[_Run]:
        """Encodes a dialogue; adjacent texts are encoded as one.

        Sentencepiece marks the beginning of a text: encoded separately, an answer would begin with a mark
        that it does not have after `ASSISTANT:`.
        """
        system = turns[0].text if turns and turns[0].role == "system" else None
        parts: list[_Part] = [self._bos, self._opening(system)]
        for number, turn in enumerate(turns if system is None else turns[1:]):
            parts += self._question(turn, number == 0) if turn.role == "user" else [self._answer(turn.text)]
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            lead = self._text(text)
            yield _Run(lead, "prompt")
            if isinstance(part, _Answer):
                yield _Run([*self._following(text, lead, part.text), *part.end], "answer")
            elif part is None:
                yield _Run([self.image_token_id] * self.image_tokens, "image")
            else:
                yield _Run([part], "prompt")
            text = ""
        yield _Run(self._text(text), "prompt")

    def _following(self, before: str, lead: list[int], text: str) -> list[int]:
        """Encodes text as the continuation of `before`, whose ids are `lead`.

        Encodes it alone when the tokenizer merges the two: a prompt ends with `lead` for every answer.
        """
        if not before:
            return self._text(text)
        both = self._text(before + text)
        return both[len(lead) :] if both[: len(lead)] == lead else self._text(text)

    def _text(self, text: str) -> list[int]:
        """Encodes plain text; split_special_tokens keeps control tokens out of its ids."""
        if not text:
            return []
        ids = self._encoded.get(text)
        if ids is None:
            whole = text.encode("utf-8", "replace").decode()  # tokenizers refuses lone surrogates
            ids = self.tokenizer.encode(whole, add_special_tokens=False, split_special_tokens=True)
            if len(self._encoded) >= _TEXTS_KEPT:
                self._encoded.clear()
            self._encoded[text] = ids
        return list(ids)

    def _control(self, token: str) -> int:
        """Returns the id of a control token. Raises UserError when the tokenizer lacks it."""
        index = self.tokenizer.get_vocab().get(token)
        if index is None:
            where = self.tokenizer.name_or_path or "this model"
            raise UserError(f"the tokenizer of {where} has no {token}; copy the one of the released model")
        return int(index)

    def _marker(self, marker: str) -> str | int:
        """Returns a marker as a control token when the tokenizer has it, else as its text."""
        return self._control(marker) if marker in self.tokenizer.get_vocab() else marker


class VicunaV1(Template):
    """Template of SFT and chat (reference, 5): BOS system line ` USER: ` image newline `question ASSISTANT:`.

    Then ` answer</s>`, and without a space between `USER: ` image newline `question ASSISTANT:` of the next
    round.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", image_token_id: int, image_tokens: int) -> None:
        super().__init__(tokenizer, image_token_id, image_tokens)
        self._eos = self._control(tokenizer.eos_token or "</s>")

    def _question(self, turn: Turn, first: bool) -> list[_Part]:
        images: list[_Part] = [None, "\n"] * len(turn.images)
        return ["USER: ", *images, f"{turn.text} ASSISTANT:"]

    def _opening(self, system: str | None) -> str:
        line = VICUNA_SYSTEM if system is None else system
        return f"{line} " if line else ""

    def _answer(self, text: str) -> _Answer:
        return _Answer(f" {text}", (self._eos,))


class Plain(Template):
    """Template of alignment and pre-training (reference, 5): BOS image caption newline, no question.

    Loss on the caption and its newline; no end token. Raises UserError for a second round.
    """

    def _runs(self, turns: Sequence[Turn]) -> Iterator[_Run]:
        if len(turns) > 2:
            raise UserError(
                f"template plain takes one question and its caption, the dialogue has {len(turns)} turns: "
                "use vicuna_v1"
            )
        return super()._runs(turns)

    def _question(self, turn: Turn, first: bool) -> list[_Part]:
        return [None] * len(turn.images)

    def _answer(self, text: str) -> _Answer:
        return _Answer(f"{text}\n")


class Captioner(Template):
    """As released (reference, 4): BOS `<|User|>:` image prompt `<TOKENS_UNUSED_0>` newline `<|Bot|>:`.

    The answer ends with `<TOKENS_UNUSED_1>`. Later rounds follow it and a newline, as in InternLM's chats.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", image_token_id: int, image_tokens: int) -> None:
        super().__init__(tokenizer, image_token_id, image_tokens)
        self._user = self._marker("<|User|>:")
        self._bot = self._marker("<|Bot|>:")
        self._end_of_turn = self._control("<TOKENS_UNUSED_0>")
        self._end_of_answer = self._control("<TOKENS_UNUSED_1>")

    def _question(self, turn: Turn, first: bool) -> list[_Part]:
        images: list[_Part] = [None] * len(turn.images)
        return ["" if first else "\n", self._user, *images, turn.text, self._end_of_turn, "\n", self._bot]

    def _answer(self, text: str) -> _Answer:
        return _Answer(text, (self._end_of_answer,))


def _check_roles(turns: Sequence[Turn], last: Literal["user", "assistant"]) -> None:
    roles = [turn.role for turn in turns]
    if roles[:1] == ["system"]:
        del roles[0]
    alternate = ["user", "assistant"] * (len(roles) // 2 + 1)
    if roles[-1:] != [last] or roles != alternate[: len(roles)]:
        ends = "and ends with the user" if last == "user" else "with the user, ends with the assistant"
        raise UserError(
            f"a dialogue begins {ends} and alternates, behind a system turn at most; its roles are "
            f"{', '.join(turn.role for turn in turns) or 'none'}"
        )


TEMPLATES: dict[str, Callable[["PreTrainedTokenizerFast", int, int], Template]] = {
    "vicuna_v1": VicunaV1,
    "plain": Plain,
    "captioner": Captioner,
}
"""By name; each takes a tokenizer, the image's token id and its number of tokens."""
