"""Strings that a tokenizer encodes as one token of its own, such as `<image>` and `<|im_end|>`, in users' texts."""

from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from sharegpt4v.dialogue import Turn
from sharegpt4v.errors import UserError


class ControlStrings:
    """Those of one tokenizer: all tokens that were added to its vocabulary. name: of the model, for errors."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self._name = name
        added = tokenizer.get_added_vocab()
        # The longest first, so that of two that begin alike the whole one is found.
        self.strings = sorted(added, key=lambda string: (-len(string), string))
        self._ids = set(added.values())

    def are_in(self, turns: Sequence[Turn]) -> bool:
        return any(string in turn.text for turn in turns for string in self.strings)

    def removed(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """Returns the same dialogue with a space in the place of each."""
        return tuple(Turn(turn.role, self._without(turn.text), turn.images) for turn in turns)

    def _without(self, text: str) -> str:
        for string in self.strings:
            text = text.replace(string, " ")
        return text

    def count(self, ids: Iterable[int]) -> Counter[int]:
        """Counts the tokens among ids that these strings are encoded to."""
        return Counter(token for token in ids if token in self._ids)

    def refused(self, turns: Sequence[Turn]) -> UserError:
        """Makes the error that names the string which cannot be kept as plain text."""
        found = next(string for string in self.strings for turn in turns if string in turn.text)
        return UserError(
            f"the text holds {found}, which the processor of {self._name} cannot keep as plain text: leave it "
            "out"
        )
