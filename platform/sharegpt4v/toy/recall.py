"""Exercises of associative recall, with which the toy language model's pre-training begins.

Answering a question about a list takes induction heads (Olsson et al. 2022, arXiv:2209.11895): one layer
marks every word with the words before it, a later one finds the place that is marked with what was asked.
Trained on dialogues alone, a model of three layers guesses among all that is listed for as long as was tried
(77,000 dialogues). Each of these exercises needs one thing more than the one before it, and is learned
within a few hundred steps.
"""

from collections.abc import Mapping, Sequence
from random import Random

from transformers import PreTrainedTokenizerFast

from sharegpt4v.templates import IGNORE_INDEX, TrainingIds
from sharegpt4v.toy.sources import COLOURS, PLACES, SHAPES, SIZES

_LENGTH = 96
"""Tokens of an exercise in copying or looking up, at most."""

_VALUES = (*SIZES, "top", "left", "right", "bottom", "centre", "yes", "no")
_MOST_PAIRS = 8
_GRID = 3
"""Keys of two words are of so many colours and shapes: neither word tells alone which of them is meant."""

_MOST_THINGS = 6
_ROUNDS = 6
_COLOURS = tuple(COLOURS)
_Name = tuple[str, str]
_NAMES: Sequence[_Name] = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class Exercises:
    """Makes exercises as token ids; only what can be known from the text before it has a label."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.in_order = (self.copying, self.lookup, self.asked_lookup, self.answering)
        self._colours, self._shapes, self._values = map(self._words, (_COLOURS, SHAPES, _VALUES))
        self._comma, self._mark = (tokenizer.encode(sign, add_special_tokens=False)[0] for sign in ",?")

    def copying(self, draw: Random) -> TrainingIds:
        """Repeats the first of two or three words, again and again: `red top red, small ring small, ...`."""
        words, text = self._colours + self._shapes + self._values, _Text(self._tokenizer)
        group = draw.choice((2, 3))
        while len(text.ids) + group + 2 <= _LENGTH:
            chosen = [draw.choice(words) for _ in range(group)]
            text.add(chosen)
            text.add(chosen[:1], labelled=True)
            text.add([self._comma])
        return text.done()

    def lookup(self, draw: Random) -> TrainingIds:
        """Lists keys of one or two words with a value each, then again in other orders."""
        return self._lookup(draw, [])

    def asked_lookup(self, draw: Random) -> TrainingIds:
        """Does as `lookup`, with a question mark between key and value from the second time on."""
        return self._lookup(draw, [self._mark])

    def _lookup(self, draw: Random, between: list[int]) -> TrainingIds:
        count = draw.randint(2, _MOST_PAIRS)
        pairs = list(zip(self._keys(draw, count), draw.sample(self._values, count), strict=True))
        text, known = _Text(self._tokenizer), False
        while len(text.ids) + sum(len(key) + 3 for key, _ in pairs) <= _LENGTH:
            draw.shuffle(pairs)
            for key, value in pairs:
                text.add([*key, *between] if known else key)
                text.add([value], labelled=known)
                text.add([self._comma])
            known = True
        return text.done()

    def answering(self, draw: Random) -> TrainingIds:
        """Asks about a list of things, without the words that a template puts between."""
        listed, rounds = things_asked(draw)
        text = _Text(self._tokenizer)
        text.add(self._ids(f"{listed},"))
        for question, answer in rounds:
            text.add(self._ids(question))
            text.add(self._ids(answer), labelled=True)
        return text.done()

    def _keys(self, draw: Random, count: int) -> Sequence[list[int]]:
        if draw.random() < 2 / 3:
            return [[key] for key in draw.sample(self._colours + self._shapes, count)]
        colours, shapes = draw.sample(self._colours, _GRID), draw.sample(self._shapes, _GRID)
        return draw.sample([[colour, shape] for colour in colours for shape in shapes], count)

    def _words(self, words: Sequence[str]) -> list[int]:
        return [token for word in words for token in self._ids(word)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(f" {text}", add_special_tokens=False)
        return ids


def things_asked(draw: Random) -> tuple[str, list[tuple[str, str]]]:
    """Returns a list of things with their places, and questions about them with their answers."""
    names = draw.sample(_NAMES, draw.randint(2, _MOST_THINGS))
    places = dict(zip(names, draw.sample(PLACES, len(names)), strict=True))
    listed = [f"{draw.choice(tuple(SIZES))} {' '.join(name)} {place}" for name, place in places.items()]
    return ", ".join(listed), [_question(places, draw) for _ in range(_ROUNDS)]


def _question(places: Mapping[_Name, str], draw: Random) -> tuple[str, str]:
    """Returns a question about one of the things, or about one that is almost there, and its answer."""
    colour, shape = draw.choice(tuple(places))
    kind = draw.choice(("place", "place", "colour", "existence"))
    if kind == "colour" and sum(other == shape for _, other in places) == 1:
        return f"What colour is the {shape}?", colour
    if kind == "existence":
        near = draw.choice(((colour, shape), (colour, draw.choice(SHAPES)), (draw.choice(_COLOURS), shape)))
        return f"Is there a {' '.join(near)}?", "yes" if near in places else "no"
    return f"Where is the {colour} {shape}?", places[colour, shape]


class _Text:
    """Token ids with their labels, from the beginning of a text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids, self._labels = [tokenizer.bos_token_id], [IGNORE_INDEX]

    def add(self, ids: Sequence[int], *, labelled: bool = False) -> None:
        self.ids += ids
        self._labels += ids if labelled else [IGNORE_INDEX] * len(ids)

    def done(self) -> TrainingIds:
        return TrainingIds(self.ids, self._labels)
