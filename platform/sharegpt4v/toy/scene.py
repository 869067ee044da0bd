"""A scene of the toy world: everything that is true about one image, before a pixel is drawn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from random import Random
from typing import Any, NamedTuple

from sharegpt4v.errors import UserError
from sharegpt4v.toy.grid import Box, Grid
from sharegpt4v.toy.sources import (
    COLOURS,
    GRID,
    LANDMARKS,
    OBJECTS_BY_DIFFICULTY,
    RELATIONS,
    ROWS,
    SHAPES,
    SIDES,
    SIZES,
    SOURCES,
    WORDS,
)

VARIANTS = 4
"""Each background comes in this many variants: another light, another horizon, other brush strokes."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape. cell: 3 * row + column of the grid; it holds the centre of the box."""

    shape: str
    colour: str
    size: str
    cell: int
    box: Box


@dataclass(frozen=True, slots=True)
class WrittenWord:
    """A word on a sign. row: row of the grid that the sign fills; box: the sign with its plate."""

    text: str
    row: int
    box: Box


@dataclass(frozen=True, slots=True)
class Landmark:
    """side: left or right; it fills the lower two rows of two columns there."""

    name: str
    side: str
    box: Box


class Relation(NamedTuple):
    """`subject` is `predicate` (above, left of, right of) `object`; both index Scene.objects."""

    subject: int
    predicate: str
    object: int


@dataclass(frozen=True, slots=True)
class Scene:
    """The whole truth behind one image; captions and pixels are pure functions of it.

    background: a name of the source's backgrounds; for wikiart it is the style. variant: which of its
    VARIANTS. objects: in reading order of their cells; no two share both colour and shape. clutter: grey bars
    that no caption mentions.
    """

    seed: int
    index: int
    source: str
    difficulty: int
    width: int
    height: int
    background: str
    variant: int
    objects: tuple[SceneObject, ...]
    words: tuple[WrittenWord, ...]
    landmark: Landmark | None
    style: str | None
    clutter: tuple[Box, ...]

    @property
    def path(self) -> str:
        """Where the image lies below the image root; unique by source and index."""
        return SOURCES[self.source].path.format(self.index)

    def counts(self, attribute: str) -> dict[str, int]:
        """Returns the number of objects by `shape`, `colour` or `size`."""
        return dict(Counter(getattr(thing, attribute) for thing in self.objects))

    def relations(self) -> tuple[Relation, ...]:
        """Lists the relations between every two objects, the earlier one in reading order first."""
        found: list[Relation] = []
        for first, one in enumerate(self.objects):
            for second in range(first + 1, len(self.objects)):
                other = self.objects[second]
                (row, column), (other_row, other_column) = divmod(one.cell, GRID), divmod(other.cell, GRID)
                holds = (row < other_row, column < other_column, column > other_column)
                found += [Relation(first, name, second) for name in compress(RELATIONS, holds)]
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Returns the record for json.dumps, with counts and relations for readers without this class."""
        return {
            **asdict(self),
            "counts": {name: self.counts(name) for name in ("shape", "colour", "size")},
            "relations": self.relations(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Scene":
        """Returns the scene of a record made by to_json, parsed from JSON text or not."""
        landmark = record["landmark"]
        return cls(
            **{name: record[name] for name in ("seed", "index", "source", "difficulty", "width", "height")},
            background=record["background"],
            variant=record["variant"],
            objects=tuple(SceneObject(**{**o, "box": Box(*o["box"])}) for o in record["objects"]),
            words=tuple(WrittenWord(**{**w, "box": Box(*w["box"])}) for w in record["words"]),
            landmark=Landmark(**{**landmark, "box": Box(*landmark["box"])}) if landmark else None,
            style=record["style"],
            clutter=tuple(Box(*box) for box in record["clutter"]),
        )


def make_scene(seed: int, index: int, *, source: str | None = None, difficulty: int = 1) -> Scene:
    """Returns scene number `index` of world `seed`; the same arguments give the same scene.

    source: a key of SOURCES; None draws one. difficulty 1: one to three objects, well apart; 2: three to
    five; 3: five to seven, smaller, off their places, overlapping, among clutter. Where a word or a landmark
    takes their place there may be fewer, none beside an easy landmark.
    Raises UserError for another source or difficulty.
    """
    _check(source, difficulty)
    rng = Random(f"{seed}/{index}/{difficulty}")
    drawn = rng.choice(tuple(SOURCES))
    name = source or drawn
    kind = SOURCES[name]
    width, height = rng.choice(kind.sizes)
    background = rng.choice(kind.backgrounds)
    grid = Grid(width, height, kind.margin)
    words = (_word(rng, grid),) if name == "textcaps" else ()
    landmark = _landmark(rng, grid) if name == "landmark" else None
    free = _free_cells(words, landmark)
    unit = kind.scale * min(grid.cell_width, grid.cell_height)
    fewest, most = (n - kind.fewer for n in OBJECTS_BY_DIFFICULTY[difficulty])
    count = min(rng.randint(fewest, most), len(free))
    return Scene(
        seed=seed,
        index=index,
        source=name,
        difficulty=difficulty,
        width=width,
        height=height,
        background=background,
        variant=rng.randrange(VARIANTS),
        objects=_objects(rng, grid, sorted(rng.sample(free, count)), unit, difficulty),
        words=words,
        landmark=landmark,
        style=background if name == "wikiart" else None,
        clutter=_clutter(rng, grid) if difficulty == 3 else (),
    )


def _check(source: str | None, difficulty: int) -> None:
    if difficulty not in OBJECTS_BY_DIFFICULTY:
        raise UserError(
            f"difficulty {difficulty} is not one of {sorted(OBJECTS_BY_DIFFICULTY)}; choose one of them"
        )
    if source is not None and source not in SOURCES:
        raise UserError(f"source {source!r} is not one of {', '.join(SOURCES)}; choose one of them")


def _word(rng: Random, grid: Grid) -> WrittenWord:
    row = rng.randrange(len(ROWS))
    return WrittenWord(rng.choice(WORDS), row, grid.box(row + 0.05, 0.08, 0.9, GRID - 0.16))


def _landmark(rng: Random, grid: Grid) -> Landmark:
    side = rng.choice(SIDES)
    return Landmark(rng.choice(LANDMARKS), side, grid.box(1, SIDES.index(side), 2, 2))


def _free_cells(words: Sequence[WrittenWord], landmark: Landmark | None) -> list[int]:
    taken = {GRID * word.row + column for word in words for column in range(GRID)}
    if landmark:
        first = SIDES.index(landmark.side)
        taken |= {GRID * row + column for row in (1, 2) for column in (first, first + 1)}
    return [cell for cell in range(GRID * GRID) if cell not in taken]


def _objects(
    rng: Random, grid: Grid, cells: Sequence[int], unit: float, difficulty: int
) -> tuple[SceneObject, ...]:
    """Places at most one object in a cell, SIZES times `unit` pixels wide."""
    # No two objects share colour and shape, so that "the red circle" always means one thing.
    looks = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], len(cells))
    objects: list[SceneObject] = []
    for cell, (colour, shape) in zip(cells, looks, strict=True):
        size = rng.choice(tuple(SIZES))
        side = SIZES[size] * unit * (rng.uniform(0.75, 1.0) if difficulty == 3 else 1.0)
        # Off the middle of its cell by no more than stays inside it, and a third of a cell at difficulty 3.
        dx, dy = (
            rng.uniform(-1, 1) * (0.33 * extent if difficulty == 3 else 0.4 * (extent - side))
            for extent in (grid.cell_width, grid.cell_height)
        )
        x, y = grid.middle(cell)
        objects.append(SceneObject(shape, colour, size, cell, grid.square(x + dx, y + dy, side)))
    return tuple(objects)


def _clutter(rng: Random, grid: Grid) -> tuple[Box, ...]:
    """Places thin grey bars, a third of a cell to a whole cell long."""
    bars: list[Box] = []
    for _ in range(rng.randint(5, 9)):
        long, thin = rng.uniform(0.3, 1.0), 0.05
        across, down = (long, thin) if rng.random() < 0.5 else (thin, long)
        row, column = rng.uniform(0, GRID - down), rng.uniform(0, GRID - across)
        bars.append(grid.box(row, column, down, across))
    return tuple(bars)
