"""The preprocessing protocols: from an image of any size to the model's square, as uint8.

A checkpoint records the protocol it was trained with: alignment and pre-training crop, SFT and
inference pad, Share-Captioner squashes. The device normalises; nothing here is ever float.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sharegpt4v.dialogue import ImageProtocol, ImageShape, SquareImages
from sharegpt4v.images.decode import load, open_image, orientation, rejecting, to_rgb_or_grey
from sharegpt4v.images.formats import ImageLimits

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour in 8 bits, as the released code pads."""

_REDUCING_GAP = 3.0
"""Average whole blocks of pixels first, down to three times the target at least, then resize bicubically.

From 1500x2250 to 336 that halves the time and differs from bicubic alone by 0.15 of 255 on average; a gap
of 2 would take a third of the time and differ by 0.25. Images below six times the target are not touched.
"""

_BICUBIC = Image.Resampling.BICUBIC
_LIMITS = ImageLimits()

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the operation that puts the picture upright."""

_RUNS_LEFT = frozenset({2, 3, 7, 8})
_RUNS_UP = frozenset({3, 4, 6, 7})
"""Orientations that reverse the stored x axis, and the stored y axis."""


@dataclass(frozen=True)
class Prepared:
    """An image in the shape that an engine takes.

    pixels: (H, W, 3) uint8, RGB, a square at model size but for whole images. width, height: pixels of the
    original after its EXIF rotation.
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


def prepare(
    data: bytes, size: int, protocol: ImageProtocol, *, fast: bool = False, limits: ImageLimits = _LIMITS
) -> Prepared:
    """Decodes `data` and brings it to size x size pixels, upright, bicubic.

    pad: on a square of PAD_COLOUR; crop: the short side to `size`, then the centre; squash: no aspect kept.
    fast: JPEGs are decoded at 1/2, 1/4 or 1/8 scale where that still covers `size`; pixels differ a little.
    Raises Rejected with the reason codes of formats.check_file and decode, never another error for bad bytes.
    """
    with rejecting(data, "image"):
        image = open_image(data, limits)
        width, height = image.size
        scale = 1.0
        if fast and image.format == "JPEG":  # HEIF would hand out an embedded thumbnail
            shrink = size / (max(width, height) if protocol == "pad" else min(width, height))
            drafted = image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))
            scale = width / drafted[1][2] if drafted else 1.0
        load(image, data)
        return _square(image, size, protocol, scale, (width, height))


def prepare_shape(
    data: bytes, shape: ImageShape, *, fast: bool = False, limits: ImageLimits = _LIMITS
) -> Prepared:
    """Decodes `data` to the shape that an engine takes. Raises Rejected as `prepare` does."""
    if isinstance(shape, SquareImages):
        return prepare(data, shape.side, shape.protocol, fast=fast, limits=limits)
    return prepare_whole(data, shape.max_pixels, fast=fast, limits=limits)


def prepare_whole(
    data: bytes, max_pixels: int, *, fast: bool = False, limits: ImageLimits = _LIMITS
) -> Prepared:
    """Decodes `data` upright in its own shape, scaled down bicubically to at most `max_pixels`.

    fast: as in `prepare`. Raises Rejected as `prepare` does.
    """
    image = open_image(data, limits)
    width, height = image.size
    shrink = min(1.0, math.sqrt(max_pixels / (width * height)))
    # A side never becomes 0, and the other one then keeps within max_pixels.
    target = (
        max(1, min(int(width * shrink), max_pixels)),
        max(1, min(int(height * shrink), max_pixels)),
    )
    if fast and image.format == "JPEG" and shrink < 1:
        image.draft(None, target)
    load(image, data)
    with rejecting(data, image.format or ""):
        whole = _resample(to_rgb_or_grey(image), target, (0, 0, *image.size)).convert("RGB")
        turn = orientation(image)
        if turn in _TURNS:
            whole = whole.transpose(_TURNS[turn])
        return Prepared(np.array(whole), *((height, width) if turn >= 5 else (width, height)))


def prepare_image(
    image: Image.Image, size: int, protocol: ImageProtocol, *, limits: ImageLimits = _LIMITS
) -> Prepared:
    """Brings an image that Pillow has opened to size x size pixels, as `prepare` does. Raises Rejected."""
    limits.check_size(*image.size)
    with rejecting(b"", "image"):  # Pillow decodes when the pixels are used
        return _square(image, size, protocol, 1.0, image.size)


def _square(
    image: Image.Image, size: int, protocol: ImageProtocol, scale: float, stored_size: tuple[int, int]
) -> Prepared:
    """Makes the square. scale, stored_size: of the file, where decoding was scaled."""
    turn = orientation(image)
    width, height = stored_size
    # All geometry is in stored axes: turning 336 x 336 pixels costs nothing, turning 12 million does.
    stored = _Stored(to_rgb_or_grey(image), width, height, scale, turn in _RUNS_LEFT, turn in _RUNS_UP)
    square = {"pad": stored.pad, "crop": stored.crop, "squash": stored.squash}[protocol](size)
    if turn in _TURNS:
        square = square.transpose(_TURNS[turn])
    if turn >= 5:
        width, height = height, width
    return Prepared(np.array(square if square.mode == "RGB" else square.convert("RGB")), width, height)


def inspect(data: bytes, limits: ImageLimits = _LIMITS) -> tuple[int, int]:
    """Decodes everything and returns width and height after the EXIF rotation only. Raises Rejected.

    Colours are converted as `prepare` does: only their use finds out that a palette is missing.
    """
    with rejecting(data, "image"):
        image = open_image(data, limits)
        load(image, data)
        width, height = image.size
        to_rgb_or_grey(image)
        return (height, width) if orientation(image) >= 5 else (width, height)


@dataclass(frozen=True)
class _Stored:
    """A decoded image in the axes of the file, and how those lie in the upright picture.

    width, height: of the file, in pixels. scale: pixels of the file for one of `image`, 1 unless
    decoding was scaled.
    """

    image: Image.Image
    width: int
    height: int
    scale: float
    runs_left: bool
    runs_up: bool

    def squash(self, size: int) -> Image.Image:
        return self._resize(size, 0.0, 0.0, self.width, self.height)

    def crop(self, size: int) -> Image.Image:
        short, long = sorted((self.width, self.height))
        wide = self.width > self.height
        resized = size * long // short  # the released processor rounds down
        lead = _lead(resized - size, self.runs_left if wide else self.runs_up)
        start, stop = lead * long / resized, min((lead + size) * long / resized, long)
        return (
            self._resize(size, start, 0.0, stop, short)
            if wide
            else self._resize(size, 0.0, start, short, stop)
        )

    def pad(self, size: int) -> Image.Image:
        """Resizes along the long axis, pads the rest, resizes along the short axis.

        So the padded square never exists at full size, yet the edge between picture and padding is
        filtered as if it did.
        """
        if self.width == self.height:
            return self.squash(size)
        side = max(self.width, self.height)
        factor = max(1, int(side / self.scale / size / _REDUCING_GAP))
        image = self.image.reduce(factor) if factor > 1 else self.image
        unit = self.scale * factor
        wide = self.width > self.height
        above = _lead(side - min(self.width, self.height), self.runs_up if wide else self.runs_left) / unit
        at = math.ceil(above)  # the picture starts on a whole pixel, the square may start inside one
        start, stop = at - above, at - above + side / unit
        if wide:
            strip = _resample(image, (size, image.height), (0, 0, side / unit, image.height))
            canvas = Image.new("RGB", (size, math.ceil(stop)), PAD_COLOUR)
            canvas.paste(strip, (0, at))
            return _resample(canvas, (size, size), (0, start, size, stop))
        strip = _resample(image, (image.width, size), (0, 0, image.width, side / unit))
        canvas = Image.new("RGB", (math.ceil(stop), size), PAD_COLOUR)
        canvas.paste(strip, (at, 0))
        return _resample(canvas, (size, size), (start, 0, stop, size))

    def _resize(self, size: int, left: float, top: float, right: float, bottom: float) -> Image.Image:
        """Resizes a box in pixels of the file to size x size."""
        box = (left / self.scale, top / self.scale, right / self.scale, bottom / self.scale)
        return _resample(self.image, (size, size), box)


def _lead(extra: int, reverse: bool) -> int:
    """Returns the part of `extra` that leads along a stored axis; upright, the smaller half leads."""
    return extra - extra // 2 if reverse else extra // 2


def _resample(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    if image.size == size and box == (0, 0, *size):
        return image
    return image.resize(size, _BICUBIC, box=box, reducing_gap=_REDUCING_GAP)
