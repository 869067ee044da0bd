"""Which words of two captions differ."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

_WORDS = re.compile(r"\s*\S+|\s+$")


@dataclass(frozen=True)
class Segment:
    """A stretch of a caption, spaces included. changed: the other caption does not have it there."""

    text: str
    changed: bool


def word_diff(a: str, b: str) -> tuple[list[Segment], list[Segment], float]:
    """Returns the segments of both texts, and the share of their words that differ, 0 to 1.

    SequenceMatcher's own heuristic for words that are frequent in a long text stays on: without it a text
    that repeats one word would take minutes.
    """
    left, right = _WORDS.findall(a), _WORDS.findall(b)
    matcher = SequenceMatcher(None, [word.strip() for word in left], [word.strip() for word in right])
    first: list[Segment] = []
    second: list[Segment] = []
    for tag, a_start, a_stop, b_start, b_stop in matcher.get_opcodes():
        first += _segments("".join(left[a_start:a_stop]), tag != "equal")
        second += _segments("".join(right[b_start:b_stop]), tag != "equal")
    return first, second, 1 - matcher.ratio()


def _segments(text: str, changed: bool) -> list[Segment]:
    """Joins words to segments; the space before a changed word belongs to what is unchanged."""
    words = text.lstrip() if changed else text
    space = text[: len(text) - len(words)]
    return [segment for segment in (Segment(space, False), Segment(words, changed)) if segment.text]
