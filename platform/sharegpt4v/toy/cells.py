"""What is where in a scene, cell by cell, as the foundation models learn it: in words, and as regions."""

from collections.abc import Iterator
from typing import NamedTuple

from sharegpt4v.toy.captions import name_of
from sharegpt4v.toy.grid import Box, Grid
from sharegpt4v.toy.scene import Scene
from sharegpt4v.toy.sources import GRID, SOURCES

NOTHING = "nothing"
"""What is said of an empty cell."""


class Region(NamedTuple):
    """box: x0, y0, x1, y1 as shares of the image. phrase: what is there."""

    box: tuple[float, float, float, float]
    phrase: str


def cell_phrases(scene: Scene) -> list[str]:
    """Returns what is in each cell, in reading order. A sign or landmark is in all the cells it fills."""
    cells = [NOTHING] * (GRID * GRID)
    for thing in scene.objects:
        cells[thing.cell] = f"{thing.size} {name_of(thing)}"
    for word in scene.words:
        cells[GRID * word.row : GRID * (word.row + 1)] = [word.text] * GRID
    if scene.landmark:
        grid, box = _grid(scene), scene.landmark.box
        for cell in range(GRID * GRID):
            x, y = grid.middle(cell)
            if box.x0 <= x < box.x1 and box.y0 <= y < box.y1:
                cells[cell] = scene.landmark.name
    return cells


def regions(scene: Scene) -> Iterator[Region]:
    """Yields the background of the whole image, then each thing and each empty cell with its place."""
    yield Region((0.0, 0.0, 1.0, 1.0), scene.background)
    spans: dict[str | int, list[int]] = {}
    phrases = cell_phrases(scene)
    for cell, phrase in enumerate(phrases):
        spans.setdefault(cell if phrase == NOTHING else phrase, []).append(cell)
    grid = _grid(scene)
    for cells in spans.values():
        (top, left), (bottom, right) = divmod(cells[0], GRID), divmod(cells[-1], GRID)
        box = grid.box(top, left, bottom - top + 1, right - left + 1)
        yield Region(_shares(box, scene), phrases[cells[0]])


def _grid(scene: Scene) -> Grid:
    return Grid(scene.width, scene.height, SOURCES[scene.source].margin)


def _shares(box: Box, scene: Scene) -> tuple[float, float, float, float]:
    return box.x0 / scene.width, box.y0 / scene.height, box.x1 / scene.width, box.y1 / scene.height
