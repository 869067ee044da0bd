"""Decodes tokens to text while they are generated: pieces that may be streamed, and stop strings."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from sharegpt4v.engine.handle import EngineError


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Decodes generated tokens to the answer, without control tokens and outer white space."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


class TextStream:
    """The text of one answer, growing token by token.

    Text that may still become a stop string or trailing white space is held back, so that the pieces joined
    are exactly the final text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], shown: str = "") -> None:
        """Starts an empty text. shown: text that an earlier try at the same answer has already streamed."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder: DecodeStream | None = DecodeStream(skip_special_tokens=True)
        self._text = ""  # all that is decoded, from the first character that is no white space
        self._shown = shown
        self.stopped = False

    def add(self, token: int) -> str:
        """Returns the piece that may be streamed now, often empty. Sets `stopped` at a stop string.

        Raises EngineError when a second try at an answer differs from the text already streamed.
        """
        before = len(self._text)
        fresh = self._decode(token)
        self._text = (self._text + fresh).lstrip() if not before else self._text + fresh
        if self._cut(max(0, before - max(map(len, self._stop), default=0))):
            return self._show(self._text.rstrip())
        return self._show(self._text[: len(self._text) - self._held()].rstrip())

    def end(self, tokens: Sequence[int]) -> tuple[str, str]:
        """Returns the last piece and the whole text. tokens: all of the answer's, without its end token."""
        if not self.stopped:
            self._text = decode(self._tokenizer, tokens)
            self._cut(0)
        text = self._text.rstrip()
        if not text.startswith(self._shown):  # invalid UTF-8 is decoded differently at the end
            text = self._shown + text[len(self._shown) :]
        return self._show(text), text

    def _decode(self, token: int) -> str:
        """Decodes one more token; after bytes that are no character returns nothing until the end."""
        if self._decoder is None:
            return ""
        try:
            return self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        except Exception:  # tokenizers raises this bare type for an invalid prefix
            self._decoder = None
            return ""

    def _cut(self, start: int) -> bool:
        """Cuts the text at the first stop string from `start` on; returns whether there is one."""
        ends = [found for stop in self._stop if (found := self._text.find(stop, start)) >= 0]
        if ends:
            self.stopped = True
            self._text = self._text[: min(ends)]
        return bool(ends)

    def _held(self) -> int:
        """Counts the characters at the end that may begin a stop string."""
        beginnings = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        return max((len(part) for part in beginnings if self._text.endswith(part)), default=0)

    def _show(self, text: str) -> str:
        if len(text) <= len(self._shown):
            return ""
        if not text.startswith(self._shown):
            raise EngineError("a second try at this answer differs from what was already streamed")
        piece = text[len(self._shown) :]
        self._shown = text
        return piece
