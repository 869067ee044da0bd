"""Backgrounds of scenes: lit plain walls, sky above ground, and painted canvases."""

from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sharegpt4v.toy.sources import BACKGROUNDS, SETTINGS

_SIDE = 384
"""Pixels of a background before it is stretched to the image; its texture is coarse enough to show at 48."""

_KEPT_PIXELS = 256 * 256

_MIST = ((150, 182, 196), (178, 202, 184), (190, 180, 208), (206, 214, 224), (140, 166, 190))
_WALL = (150, 132, 118)
_SKY = ((150, 192, 232), (132, 146, 108))

RGB = tuple[int, int, int]


def background_image(name: str, variant: int, size: tuple[int, int]) -> Image.Image:
    """Returns a shared RGB image of `size`: copy it before drawing on it."""
    # Small ones come by the hundred thousand in training; a large one takes up to 20 MB, so none is kept.
    stretch = _kept if size[0] * size[1] <= _KEPT_PIXELS else _stretched
    return stretch(name, variant, size)


def _stretched(name: str, variant: int, size: tuple[int, int]) -> Image.Image:
    return _tile(name, variant).resize(size, Image.Resampling.BILINEAR)


_kept = lru_cache(maxsize=64)(_stretched)


@lru_cache(maxsize=64)
def _tile(name: str, variant: int) -> Image.Image:
    rng = Random(f"{name}/{variant}")
    if name in BACKGROUNDS:
        return _lit(_plain(BACKGROUNDS[name]), rng)
    if name in SETTINGS:
        return _horizon(*SETTINGS[name], rng)
    return _DRAWN[name](rng)


def _plain(colour: RGB) -> Image.Image:
    return Image.new("RGB", (_SIDE, _SIDE), colour)


def _lit(image: Image.Image, rng: Random, strength: float = 16) -> Image.Image:
    """Brightens one side and darkens the opposite one, by `strength` of 255."""
    ramp = np.linspace(-strength, strength, image.width)
    across, down = rng.choice(((1.0, 0.0), (0.7, 0.7), (0.0, 1.0), (-0.7, 0.7), (-1.0, 0.0)))
    light = across * ramp[None, :, None] + down * ramp[:, None, None]
    return _image(np.asarray(image) + light)


def _horizon(sky: RGB, ground: RGB, rng: Random) -> Image.Image:
    """Draws sky above ground: the sky brightens towards the horizon, the ground towards the viewer."""
    line = rng.uniform(0.4, 0.6)
    y = (np.arange(_SIDE) + 0.5) / _SIDE
    above = np.array(sky) + 14 * (y[:, None] / line - 0.5)
    below = np.array(ground) + 14 * ((y[:, None] - line) / (1 - line) - 0.5)
    rows = np.where(y[:, None] < line, above, below)
    return _image(np.repeat(rows[:, None, :], _SIDE, axis=1))


def _image(pixels: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))


def _bricks(rng: Random) -> Image.Image:
    image = _plain(_WALL)
    draw = ImageDraw.Draw(image)
    for row in range(12):
        draw.line((0, 32 * row, _SIDE, 32 * row), fill=(132, 116, 104), width=4)
        for x in range(32 * (row % 2), _SIDE, 64):
            draw.line((x, 32 * row, x, 32 * row + 32), fill=(132, 116, 104), width=4)
    return _lit(image, rng)


def _facets(rng: Random) -> Image.Image:
    """Draws the cubist canvas: triangles of greys and browns."""
    image = _plain((176, 164, 148))
    draw = ImageDraw.Draw(image)
    step = _SIDE // 4
    for x in range(0, _SIDE, step):
        for y in range(0, _SIDE, step):
            corners = [(x, y), (x + step, y), (x + step, y + step), (x, y + step)]
            for leave in rng.choice(((0, 2), (1, 3))):
                shade = rng.choice(((196, 186, 170), (168, 152, 132), (140, 132, 128), (208, 204, 196)))
                draw.polygon([c for i, c in enumerate(corners) if i != leave], fill=shade)
    return image


def _dots(rng: Random) -> Image.Image:
    """Draws the pointillist canvas: pale dots on cream, one in each cell of a grid so that none touch."""
    image = _plain((250, 240, 212))
    draw = ImageDraw.Draw(image)
    for x in range(0, _SIDE, 32):
        for y in range(0, _SIDE, 32):
            dx, dy = rng.uniform(6, 26), rng.uniform(6, 26)
            shade = rng.choice(((222, 170, 150), (160, 196, 160), (150, 176, 216), (226, 204, 120)))
            draw.circle((x + dx, y + dy), 9, fill=shade)
    return image


def _strokes(rng: Random) -> Image.Image:
    """Draws the impressionist canvas: long slanted strokes in pale blues, greens and lilacs."""
    image = _plain((172, 190, 206))
    draw = ImageDraw.Draw(image)
    for _ in range(170):
        x, y, length = rng.uniform(-40, _SIDE), rng.uniform(0, _SIDE), rng.uniform(40, 90)
        shade = rng.choice(_MIST)
        draw.line((x, y, x + length, y - 0.4 * length), fill=shade, width=14)
    return image


def _cuts(rng: Random) -> Image.Image:
    """Draws the woodcut canvas: dark lines across pale paper."""
    image = _plain((230, 222, 204))
    draw = ImageDraw.Draw(image)
    offset = rng.randrange(32)
    for y in range(-32, _SIDE + 32, 32):
        draw.line((0, y + offset, _SIDE, y + offset), fill=(92, 84, 76), width=rng.choice((6, 8, 10)))
    return image


_DRAWN: dict[str, Callable[[Random], Image.Image]] = {
    "wall": _bricks,
    "sky": lambda rng: _horizon(*_SKY, rng),
    "cubist": _facets,
    "pointillist": _dots,
    "impressionist": _strokes,
    "woodcut": _cuts,
}
