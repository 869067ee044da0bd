"""Decodes tokens to text while they are generated: pieces that may be streamed, and stop strings."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from sharegpt4v.engine.handle import EngineError

_BROKEN = "\ufffd"
"""What tokenizers decode bytes to that are no character, or not yet a whole one."""

_MOST_BYTES = 4
"""Bytes of one character in UTF-8: as many without one will never be a character."""


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Decodes generated tokens to the answer, without control tokens and outer white space."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


class Detokenizer:
    """Decodes tokens one by one: each piece follows the last one, and no piece is taken back.

    Bytes that are no character become the replacement character, one or more, and the text goes on behind
    them. recovered: whether that happened. The pieces may then differ from the tokens decoded at once,
    because tokenizers give up a whole run of bytes for one wrong byte in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._context: list[int] = []  # of the last piece: it decides about the white space before the next
        self._before = ""  # the text of the context
        self._pending: list[int] = []  # tokens since
        self.recovered = False

    def add(self, token: int) -> str:
        """Returns the text that is certain with this token, often empty."""
        self._pending.append(token)
        piece = ""
        while (text := self._decode(self._context + self._pending)).endswith(_BROKEN):
            alone = self._decode(self._pending)
            if len(alone) - len(alone.rstrip(_BROKEN)) < _MOST_BYTES or len(self._pending) == 1:
                return piece  # these may be the first bytes of a character
            first, *self._pending = self._pending
            piece += self._decode([first])
            self._forget_context()
        if not text.startswith(self._before):
            # Bytes of the last piece's characters now belong to a run that is broken behind them.
            self._forget_context()
            text = self._decode(self._pending)
        fresh = text[len(self._before) :]
        if fresh:
            self._context, self._before = self._pending, self._decode(self._pending)
            self._pending = []
        return piece + fresh

    def rest(self) -> str:
        """Returns the text of an unfinished character at the end."""
        text = self._decode(self._context + self._pending)
        if not text.startswith(self._before):
            self._forget_context()
            text = self._decode(self._pending)
        return text[len(self._before) :]

    def _forget_context(self) -> None:
        self.recovered = True
        self._context, self._before = [], ""

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=True))


class TextStream:
    """The text of one answer, growing token by token.

    Text that may still become a stop string or trailing white space is held back, so that the pieces joined
    are exactly the final text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], shown: str = "") -> None:
        """Starts an empty text. shown: text that an earlier try at the same answer has already streamed."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoded = Detokenizer(tokenizer)
        self._text = ""  # all that is decoded, white space at its ends included: a stop string may be of it
        self._shown = shown
        self.stopped = False

    def add(self, token: int) -> str:
        """Returns the piece that may be streamed now, often empty. Sets `stopped` at a stop string.

        Raises EngineError when a second try at an answer differs from the text already streamed.
        """
        before = len(self._text)
        self._text += self._decoded.add(token)
        if self._cut(max(0, before - max(map(len, self._stop), default=0))):
            return self._show(self._text.strip())
        return self._show(self._text[: len(self._text) - self._held()].strip())

    def end(self, tokens: Sequence[int]) -> tuple[str, str]:
        """Returns the last piece and the whole text. tokens: all of the answer's, without its end token."""
        if not self.stopped:
            self._text += self._decoded.rest()
            self._cut(0)
        text = self._text.strip()
        if not (self.stopped or self._decoded.recovered):
            whole = decode(self._tokenizer, tokens)
            text = whole if whole.startswith(self._shown) else text
        return self._show(text), text

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
