"""Strings in users' texts that a tokenizer would encode as tokens of their own: `<image>`, `<|im_end|>`."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from sharegpt4v.dialogue import Turn
from sharegpt4v.errors import UserError


class ControlStrings:
    """Those of one tokenizer: all tokens added to its vocabulary. name: of the model, for errors."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self._name = name
        added = tokenizer.get_added_vocab()
        # The longest first, so that of two that begin alike the whole one is found.
        self.strings = sorted(added, key=lambda string: (-len(string), string))
        self._ids = set(added.values())
        self._pattern = re.compile("|".join(map(re.escape, self.strings)) or "(?!)")

    def are_in(self, turns: Sequence[Turn]) -> bool:
        return any(string in turn.text for turn in turns for string in self.strings)

    def removed(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """Returns the same dialogue with a space in the place of each."""
        return tuple(Turn(turn.role, self._without(turn.text), turn.images) for turn in turns)

    def _without(self, text: str) -> str:
        for string in self.strings:
            text = text.replace(string, " ")
        return text

    def hide(self, text: str, key: str) -> str:
        """Replaces each by a word made of `key`, which no text holds; `split` finds them again."""
        return self._pattern.sub(lambda match: f"{key}{self.strings.index(match[0])};", text)

    def split(self, text: str, key: str) -> list[str]:
        """Splits a text at hidden strings: every second part is one of them, as it was."""
        parts = re.split(f"{key}([0-9]+);", text)
        parts[1::2] = [self.strings[int(number)] for number in parts[1::2]]
        return parts

    def count(self, ids: Iterable[int]) -> Counter[int]:
        """Counts the tokens among ids that these strings are encoded to."""
        return Counter(token for token in ids if token in self._ids)

    def refused(self, turns: Sequence[Turn]) -> UserError:
        """Makes the error that names the string which cannot be kept as plain text."""
        found = next(string for string in self.strings for turn in turns if string in turn.text)
        return UserError(
            f"the text holds {found}, which the processor of {self._name} cannot keep as plain text: leave "
            "it out"
        )
