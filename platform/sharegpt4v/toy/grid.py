"""Places in an image: boxes, and the grid that scenes are laid out on."""

from typing import NamedTuple

from sharegpt4v.toy.sources import GRID


class Box(NamedTuple):
    """Pixels of the full-size image; x1 and y1 are past the last one."""

    x0: int
    y0: int
    x1: int
    y1: int


class Grid:
    """3 x 3 cells over the part of an image that lies inside its margin; all in pixels.

    margin: share of each side.
    """

    def __init__(self, width: int, height: int, margin: float) -> None:
        self.left, self.top = width * margin, height * margin
        self.cell_width = (width - 2 * self.left) / GRID
        self.cell_height = (height - 2 * self.top) / GRID

    def box(self, row: float, column: float, rows: float, columns: float) -> Box:
        """Returns the pixels of a block of the grid whose position and size are given in cells."""
        x0, y0 = self.left + column * self.cell_width, self.top + row * self.cell_height
        x1, y1 = x0 + columns * self.cell_width, y0 + rows * self.cell_height
        return Box(round(x0), round(y0), round(x1), round(y1))

    def middle(self, cell: int) -> tuple[float, float]:
        """Returns the centre of cell 3 * row + column."""
        row, column = divmod(cell, GRID)
        return self.left + (column + 0.5) * self.cell_width, self.top + (row + 0.5) * self.cell_height

    def square(self, x: float, y: float, side: float) -> Box:
        """Returns a square around (x, y), moved inside the margin."""
        right, bottom = self.left + GRID * self.cell_width, self.top + GRID * self.cell_height
        x0 = round(min(max(x - side / 2, self.left), right - side))
        y0 = round(min(max(y - side / 2, self.top), bottom - side))
        return Box(x0, y0, x0 + round(side), y0 + round(side))
