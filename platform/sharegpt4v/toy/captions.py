"""Writes the captions of a scene: pure functions of its truth, in a fixed order and a small grammar."""

from collections.abc import Iterator, Sequence

from sharegpt4v.toy.scene import Scene, SceneObject
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


def detailed_caption(scene: Scene) -> str:
    """Describes everything in the image: its kind, the count, every object in reading order, one relation."""
    things = scene.objects
    text = _opening(scene, _counted(len(things)))
    if things:
        text += ": " + _listed([_object_phrase(thing) for thing in things])
    text += "."
    if len(things) > 1:
        text += " " + _relation_sentence(things[0], stated_relation(scene), things[-1])
    return text


def brief_caption(scene: Scene) -> str:
    """Describes the most prominent thing in one short sentence; true, but far from complete."""
    if scene.words:
        return f'A sign that says "{scene.words[0].text}".'
    if scene.landmark:
        return f"A view of {scene.landmark.name}."
    main = next((thing for thing in scene.objects if thing.size == "large"), scene.objects[0])
    others = len(scene.objects) - 1
    kind = STYLES[scene.style] if scene.style else "A photo" if scene.source == "coco" else "A wide view"
    rest = f" and {_counted(others, 'other ')}" if others else ""
    return f"{kind} with {_article(main.colour)} {name_of(main)}{rest}."


def stated_relation(scene: Scene) -> str:
    """Returns the relation between the first and the last object that a detailed caption states."""
    first, last = 0, len(scene.objects) - 1
    return next(r.predicate for r in scene.relations() if (r.subject, r.object) == (first, last))


def _opening(scene: Scene, counted: str) -> str:
    if scene.words:
        word = scene.words[0]
        return f'A sign across the {ROWS[word.row]} says "{word.text}", with {counted}'
    if scene.landmark:
        return f"A view of {scene.landmark.name} on the {scene.landmark.side}, with {counted}"
    if scene.style:
        return f"{STYLES[scene.style]} of {counted}"
    if scene.source == "sam":
        return f"A wide view of a {scene.background} with {counted}"
    return f"A photo of {counted} on a {scene.background} background"


def _counted(count: int, which: str = "") -> str:
    return f"{COUNTS[count]} {which}{'shape' if count == 1 else 'shapes'}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def name_of(thing: SceneObject) -> str:
    """Returns colour and shape, which no two objects of a scene share."""
    return f"{thing.colour} {thing.shape}"


def _object_phrase(thing: SceneObject) -> str:
    return f"{_article(thing.size)} {thing.size} {name_of(thing)} {PLACES[thing.cell]}"


def _relation_sentence(first: SceneObject, predicate: str, last: SceneObject) -> str:
    return f"The {name_of(first)} is {predicate} the {name_of(last)}."


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def phrases() -> Iterator[str]:
    """Yields texts that hold every word of every possible caption, for the tokenizer's vocabulary."""
    for count in range(len(COUNTS)):
        counted = _counted(count)
        yield from (f"A photo of {counted} on a {name} background:" for name in BACKGROUNDS)
        yield from (f"A wide view of a {name} with {counted}." for name in SETTINGS)
        yield from (
            f"{opening} of {counted} with {_counted(count, 'other ')}." for opening in STYLES.values()
        )
        yield from (f"A view of {name} on the {side}, with {counted}" for name in LANDMARKS for side in SIDES)
        yield from (
            f'A sign across the {row} says "{word}", with {counted}' for row in ROWS for word in WORDS
        )
    for thing in (f"{colour} {shape}" for colour in COLOURS for shape in SHAPES):
        yield f"with {_article(thing)} {thing} and"
        yield from (f"The {thing} is {predicate} the {thing}." for predicate in RELATIONS)
        yield from (f"{_article(size)} {size} {thing} {place}, and" for size in SIZES for place in PLACES)
    yield from (f'A sign that says "{word}".' for word in WORDS)
