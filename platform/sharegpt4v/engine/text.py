"""Tokens to text while they are generated: pieces that may be shown, and stop strings."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """The answer that these generated tokens spell, without control tokens and outer white space."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


class TextStream:
    """The text of one answer, growing token by token.

    What could still turn out to be a stop string or trailing white space is held back, so that the pieces
    joined are exactly the final text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], shown: int = 0) -> None:
        """shown: characters that an earlier try at the same answer has already given out."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._text = ""  # all that is decoded, from the first character that is no white space
        self._shown = shown
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece that may be shown now, often empty. Sets `stopped` when a stop string has come."""
        fresh = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        before = len(self._text)
        self._text = (self._text + fresh).lstrip() if not before else self._text + fresh
        ends = [
            found for stop in self._stop if (found := self._text.find(stop, max(0, before - len(stop)))) >= 0
        ]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
            return self._show(len(self._text.rstrip()))
        return self._show(len(self._text[: len(self._text) - self._held()].rstrip()))

    def end(self, tokens: Sequence[int]) -> tuple[str, str]:
        """The last piece and the whole text. tokens: all of the answer's, without its end token."""
        if not self.stopped:
            self._text = decode(self._tokenizer, tokens)
        self._text = self._text.rstrip()
        return self._show(len(self._text)), self._text

    def _held(self) -> int:
        """Characters at the end that begin a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
            default=0,
        )

    def _show(self, until: int) -> str:
        piece = self._text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece
