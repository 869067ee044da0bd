"""Small JPEG copies of images as data URIs, for pages that must stand alone."""

import io
import math
from base64 import b64encode

from PIL import Image

from sharegpt4v.captions.parts import Location
from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageReader, StorageError, prepare

BYTES = 26_000
"""Of one thumbnail's data URI, at most: 500 of them are 13 MB."""

SIDE = 400
"""Longest side in pixels: sharp at 200 CSS pixels on a screen of double density."""

_STEPS = ((1.0, 78), (1.0, 60), (0.7, 60), (0.45, 50), (0.25, 40))
"""Scale and JPEG quality, tried in turn until the bytes fit."""


class Thumbnailer:
    """Reads images below `root` and shrinks each to at most `limit` bytes of data URI."""

    def __init__(self, root: str | None, limit: int) -> None:
        self._reader = ImageReader(root)
        self._limit = min(limit, BYTES)
        self._storage_fails = False

    def data_uri(self, place: Location, width: int, height: int) -> str | None:
        """`data:image/jpeg;base64,...` of an image of width x height pixels.

        None when the image is gone or broken, when it cannot be made to fit, and for every image once the
        storage has failed: waiting through its retries for each of 500 images would take an hour.
        """
        if self._storage_fails:
            return None
        try:
            data = self._reader.read(place.image, place.container, place.offset, place.size)
            image = _shrink(data, min(SIDE, max(width, height)))
        except Rejected:
            return None
        except StorageError:
            self._storage_fails = True
            return None
        for scale, quality in _STEPS:
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            buffer = io.BytesIO()
            image.resize(size).save(buffer, "JPEG", quality=quality, optimize=True)
            uri = "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode()
            if len(uri) <= self._limit:
                return uri
        return None


def _shrink(data: bytes, side: int) -> Image.Image:
    """The upright image with `side` as its longer side. Raises Rejected."""
    prepared = prepare(data, side, "pad", fast=True)
    scale = side / max(prepared.width, prepared.height)
    left, right = _without_padding(side, prepared.width * scale)
    top, bottom = _without_padding(side, prepared.height * scale)
    return Image.fromarray(prepared.pixels).crop((left, top, right, bottom))


def _without_padding(side: int, length: float) -> tuple[int, int]:
    """First and last pixel of what lies in the middle of `side`; one that is partly padding is cut."""
    first = math.ceil((side - length) / 2)
    return first, max(first + 1, math.floor((side + length) / 2))
