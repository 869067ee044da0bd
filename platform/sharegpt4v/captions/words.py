"""The words of captions, a batch at a time: which are frequent, and codes for whoever compares texts.

A word is a run of letters, marks and digits of any script, in lower case.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

CHARACTERS = 4_000
"""Of a caption that are looked at: over four times the paper's mean length (reference: 942)."""

LONGEST_WORD = 40
"""Characters; a text without spaces would otherwise be one word."""

VOCABULARY = 200_000
"""Words counted at once; beyond, the rarer half is dropped and frequent words keep their counts."""

STOP_WORDS = frozenset(
    """a about above across after all along also although an and another any are around as at back be because
    been before behind being below beneath beside between both but by can could did do does down each either
    else few for from further had has have having he her here him his how if in into is it its itself just
    like many may might more most much near nearby next no nor not of off on one onto or other others our out
    over own per rather same several she should so some such than that the their them then there these they
    this those though through to together too toward towards two under up upon us very was we were what when
    where which while who whose will with within without would you your""".split()
)
"""English words that say nothing of a picture."""


@dataclass(frozen=True)
class Tokens:
    """Words of a batch of captions.

    texts: each caption as its words with one space between. vocabulary: the distinct words. codes: (words,)
    int64 into the vocabulary, caption after caption. lengths: (captions,) int64, words of each.
    """

    texts: pa.Array
    vocabulary: list[str]
    codes: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def tokenise(captions: pa.Array) -> Tokens:
    """Returns the words of the first CHARACTERS of each caption; a null has none."""
    text = pc.utf8_lower(pc.utf8_slice_codeunits(pc.fill_null(captions, ""), 0, CHARACTERS))
    # Two passes: one pattern that also takes single spaces would match seven times as often.
    spaced = pc.replace_substring_regex(text, r"[^\pL\pM\pN ]+", " ")
    texts = pc.utf8_trim(pc.replace_substring_regex(spaced, " {2,}", " "), " ")
    words = pc.split_pattern(texts, " ")
    lengths = np.where(pc.equal(texts, ""), 0, pc.list_value_length(words)).astype(np.int64)
    flat = pc.list_flatten(words)
    encoded = flat.filter(pc.not_equal(flat, "")).dictionary_encode()
    return Tokens(texts, encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64), lengths)


class WordCounts:
    """Counts the captions that have each content word."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, tokens: Tokens) -> None:
        """Adds the content words of a batch: those that are no stop word, number or single letter."""
        size = len(tokens.vocabulary)
        content = np.array([_is_content(word) for word in tokens.vocabulary], np.bool_)
        captions = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
        wanted = content[tokens.codes] if size else np.zeros(0, np.bool_)
        # A word counts once a caption, however often the caption says it.
        keys = captions[wanted] * size + tokens.codes[wanted]
        keys.sort(kind="stable")  # radix sort, far faster than np.unique
        once = keys[np.diff(keys, prepend=-1) != 0]
        counts = np.bincount(once % max(size, 1), minlength=size)
        for code in np.flatnonzero(counts):
            self._counts[tokens.vocabulary[code]] += int(counts[code])
        if len(self._counts) > VOCABULARY:
            self._counts = Counter(dict(self._counts.most_common(VOCABULARY // 2)))

    def most_common(self, count: int) -> list[tuple[str, int]]:
        """Returns the words in most captions and the number of those, equal ones in alphabetical order."""
        return sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))[:count]


def _is_content(word: str) -> bool:
    return 1 < len(word) <= LONGEST_WORD and word not in STOP_WORDS and not word.isdigit()
