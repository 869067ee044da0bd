"""Polygons in the unit square, (x, y) with y down: outlines of objects and of landmarks."""

import math

Outline = tuple[tuple[float, float], ...]


def _arc(centre: tuple[float, float], radii: tuple[float, float], start: float, end: float) -> Outline:
    """Returns points along an ellipse from angle `start` to `end`, in turns, clockwise from the right."""
    steps = max(8, round(64 * abs(end - start)))
    angles = (2 * math.pi * (start + (end - start) * i / steps) for i in range(steps + 1))
    return tuple((centre[0] + radii[0] * math.cos(a), centre[1] + radii[1] * math.sin(a)) for a in angles)


def _block(x0: float, y0: float, x1: float, y1: float) -> Outline:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


_MIDDLE = (0.5, 0.5)
_CIRCLE = _arc(_MIDDLE, (0.5, 0.5), 0, 1)
_HOLE = _arc(_MIDDLE, (0.25, 0.25), 1, 0)
_NEAR, _FAR = 0.31, 0.69  # edges of the cross's bars

SHAPE_OUTLINES: dict[str, Outline] = {
    "circle": _CIRCLE,
    "square": _block(0.03, 0.03, 0.97, 0.97),
    "triangle": ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "cross": (
        ((_NEAR, 0.0), (_FAR, 0.0), (_FAR, _NEAR), (1.0, _NEAR), (1.0, _FAR), (_FAR, _FAR))
        + ((_FAR, 1.0), (_NEAR, 1.0), (_NEAR, _FAR), (0.0, _FAR), (0.0, _NEAR), (_NEAR, _NEAR))
    ),
    # One polygon with a seam on the right: out around, in around, and even-odd filling leaves the hole.
    "ring": _CIRCLE + _HOLE,
}

_STEPS = tuple(
    point
    for i in range(5)
    for point in ((0.06 + 0.09 * i, 0.95 - 0.17 * i), (0.06 + 0.09 * i, 0.95 - 0.17 * (i + 1)))
)

LANDMARK_OUTLINES: dict[str, tuple[Outline, ...]] = {
    "Meridian Tower": (
        ((0.5, 0.02), (0.55, 0.3), (0.6, 0.6), (0.75, 0.95), (0.25, 0.95), (0.4, 0.6), (0.45, 0.3)),
        _block(0.36, 0.34, 0.64, 0.42),
    ),
    "Harrow Bridge": (
        _block(0.0, 0.68, 1.0, 0.8),
        _block(0.2, 0.2, 0.28, 0.95),
        _block(0.72, 0.2, 0.8, 0.95),
        _arc((0.5, 0.2), (0.26, 0.4), 0.5, 0) + _arc((0.5, 0.2), (0.2, 0.33), 0, 0.5),
        ((0.0, 0.7), (0.2, 0.2), (0.24, 0.26), (0.07, 0.7)),
        ((1.0, 0.7), (0.8, 0.2), (0.76, 0.26), (0.93, 0.7)),
    ),
    "Lantern Arch": (
        _arc((0.5, 0.52), (0.44, 0.44), 0.5, 1)
        + ((0.94, 0.95), (0.7, 0.95))
        + _arc((0.5, 0.52), (0.2, 0.2), 1, 0.5)
        + ((0.3, 0.95), (0.06, 0.95)),
    ),
    "Ember Pyramid": (_STEPS + tuple((1 - x, y) for x, y in reversed(_STEPS)),),
    "Solace Spires": (
        ((0.22, 0.03), (0.36, 0.5), (0.36, 0.95), (0.08, 0.95), (0.08, 0.5)),
        ((0.78, 0.03), (0.92, 0.5), (0.92, 0.95), (0.64, 0.95), (0.64, 0.5)),
        _block(0.3, 0.74, 0.7, 0.95),
    ),
    "Vellan Dome": (
        _arc((0.5, 0.56), (0.36, 0.4), 0.5, 1),
        _block(0.06, 0.55, 0.94, 0.66),
        *(_block(x, 0.66, x + 0.1, 0.95) for x in (0.08, 0.326, 0.573, 0.82)),
        _block(0.04, 0.88, 0.96, 0.95),
        _block(0.47, 0.03, 0.53, 0.2),
    ),
}
