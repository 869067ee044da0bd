"""One JSON array, an element at a time, by Python's own JSON parser.

Streaming parsers keep the path to every open bracket: an array nested 100,000 deep took all memory of the
machine. This one ends such a file as it ends any other with a mistake.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from sharegpt4v.errors import UserError

MAX_RECORD = 64 << 20
"""Characters of one record: with a quote missing, the rest of a large file would be read as one text."""

_CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_END = 64
"""Characters from the end of what was read in which a mistake may be a token that is not all there."""


def array_records(file: IO[bytes], name: str) -> Iterator[Any]:
    """Yields the elements of the array that `file` holds from its position on. Memory holds one at a time.

    Raises UserError for an array that is cut or no JSON, with the byte and the record.
    """
    text = _Text(file, name)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        while True:
            yield text.record()
            if text.peek() == "]":
                break
            text.take(",")
        text.take("]")
    if text.peek():
        raise text.mistake("something follows the array", text.at)


def describe_mistake(error: Exception) -> str:
    """Says what Python's JSON parser found wrong."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


class _Text:
    """The text of a file from `at` on, as far as it was read."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.at = 0
        self._file = file
        self._name = name
        self._begin = file.tell()
        self._text = ""
        self._ended = False
        self._records = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def peek(self) -> str:
        """Returns the next character that is no space; "" at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._read()

    def take(self, character: str) -> None:
        """Passes over a character that must come next."""
        found = self.peek()
        if found != character:
            raise self.mistake(f"expected {character!r}", self.at) if found else self._cut()
        self.at += 1

    def record(self) -> Any:
        """Passes over the next element and returns it."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if not self._is_unfinished(error):
                    raise self.mistake(describe_mistake(error), error.pos) from error
                if self._ended:
                    raise self._cut() from error
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits; nested too deep
                raise self.mistake(describe_mistake(error), self.at) from error
            else:
                if end < len(self._text) or self._ended:  # at the end of the text a number may go on
                    self.at = end
                    self._records += 1
                    return value
            if len(self._text) - self.at > MAX_RECORD:
                raise self.mistake(f"over {MAX_RECORD:,} characters, or without a closing quote", self.at)
            self._read()

    def mistake(self, reason: str, at: int) -> UserError:
        """Returns the error for a mistake at a place of the text."""
        left = len(self._text[at:].encode()) + len(self._utf8.getstate()[0])
        return UserError(
            f"{self._name} is not valid JSON ({reason}) at byte {self._file.tell() - left}, in record "
            f"{self._records + 1}"
        )

    def _is_unfinished(self, error: json.JSONDecodeError) -> bool:
        """Returns whether the parser may have run into the end of what was read."""
        rest = self._text[error.pos :]
        return error.msg.startswith("Unterminated") or (
            not rest.strip() if self._ended else len(rest) < _NEAR_END
        )

    def _cut(self) -> UserError:
        return UserError(
            f"{self._name} is cut: it ends at byte {self._file.tell()} inside the array, after "
            f"{self._records} whole records; copy or download it again"
        )

    def _read(self) -> None:
        """Reads on: as much again as one record has so far, so a large one is parsed a few times only."""
        data = self._file.read(max(_CHUNK, len(self._text) - self.at))
        self._ended = not data
        try:
            more = self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._name} is not UTF-8 ({error.reason}) at byte "
                f"{self._file.tell() - len(error.object) + error.start}, in or after record "
                f"{self._records + 1}"
            ) from error
        self._text, self.at = self._text[self.at :] + more, 0
