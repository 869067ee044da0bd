"""Extracts the facts that a detailed caption states, so that captions can be scored against the truth."""

import re
from collections.abc import Iterable

from sharegpt4v.toy.captions import name_of, stated_relation
from sharegpt4v.toy.scene import Scene
from sharegpt4v.toy.sources import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    LANDMARKS,
    PLACES,
    RELATIONS,
    ROWS,
    SETTINGS,
    SHAPES,
    SIDES,
    SIZES,
    STYLES,
    WORDS,
)

Fact = tuple[str, ...]
"""(kind, *what), as ("place", "red circle", "at the top"). Kinds: background, setting, style, word, word_row,
landmark, landmark_side, count, object, size, place, relation."""


def scene_facts(scene: Scene) -> frozenset[Fact]:
    """Returns the facts that a complete and true detailed caption of the scene states."""
    facts: set[Fact] = {("count", COUNTS[len(scene.objects)])}
    for word in scene.words:
        facts |= {("word", word.text), ("word_row", ROWS[word.row])}
    if scene.landmark:
        facts |= {("landmark", scene.landmark.name), ("landmark_side", scene.landmark.side)}
    if scene.style:
        facts.add(("style", scene.style))
    if scene.background in BACKGROUNDS:
        facts.add(("background", scene.background))
    if scene.background in SETTINGS:
        facts.add(("setting", scene.background))
    for thing in scene.objects:
        name = name_of(thing)
        facts |= {("object", name), ("size", name, thing.size), ("place", name, PLACES[thing.cell])}
    if len(scene.objects) > 1:
        facts.add(("relation", name_of(scene.objects[0]), stated_relation(scene), name_of(scene.objects[-1])))
    return frozenset(facts)


def caption_facts(caption: str) -> frozenset[Fact]:
    """Returns the facts a caption states, true or not; text outside the grammar states none.

    A model's caption may be wrong, cut or garbled: each fact is found on its own.
    """
    facts: set[Fact] = set()
    for kinds, pattern in _PATTERNS:
        for match in pattern.finditer(caption):
            facts.update((kind, value) for kind, value in zip(kinds, match.groups(), strict=True))
    for size, name, place in _OBJECT.findall(caption):
        facts |= {("object", name), ("size", name, size), ("place", name, place)}
    facts.update(("relation", *found) for found in _RELATION.findall(caption))
    return frozenset(facts)


def _any(choices: Iterable[str]) -> str:
    # The longest first: "at the top" must not win over "at the top left".
    return "(?:" + "|".join(sorted(map(re.escape, choices), key=len, reverse=True)) + r")\b"


_NAME = f"({_any(COLOURS)} {_any(SHAPES)})"
_OBJECT = re.compile(rf"\ban? ({_any(SIZES)}) {_NAME} ({_any(PLACES)})")
_RELATION = re.compile(rf"\bThe {_NAME} is ({_any(RELATIONS)}) the {_NAME}")
_PATTERNS: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    (("count",), re.compile(rf"\b({_any(COUNTS)}) shapes?\b")),
    (("background",), re.compile(rf"\bon a ({_any(BACKGROUNDS)}) background\b")),
    (("setting",), re.compile(rf"\bview of a ({_any(SETTINGS)})")),
    (("landmark", "landmark_side"), re.compile(rf"\bview of ({_any(LANDMARKS)}) on the ({_any(SIDES)})")),
    (("word_row", "word"), re.compile(rf'\bacross the ({_any(ROWS)}) says "({_any(WORDS)})"')),
    (("style",), re.compile(rf"\bAn? ({_any(STYLES)}) (?:painting|print)\b")),
)
