"""JPEG copies of images as data URIs, for pages that must be one file: as good as their size allows."""

import io
import math
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from sharegpt4v.captions.parts import Location
from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageLimits, ImageReader, StorageError, prepare
from sharegpt4v.images.decode import open_image

SIDE = 560
"""Longest side in pixels: a card shows it at about 200 CSS pixels, the enlarged view in full."""

SMALLEST_SIDE = 400
"""Longest side that is enough where a JPEG decodes to it at half, a quarter or an eighth of its size.

That takes a third of the time.
"""

READERS = 8
"""Images read at once: a remote root answers slowly, but answers many."""

_QUALITY = 76
_SMALLER = ((1.0, 58), (0.72, 58), (0.45, 50), (0.2, 40))
"""Scale and JPEG quality of what takes the place of a picture that is too large, tried in turn."""

_PREFIX = "data:image/jpeg;base64,"


def embedded(root: str | None, places: Sequence[Location | None], limit: int) -> list[str | None]:
    """Returns a data URI of each image, together at most `limit` characters.

    Images that need little leave more for others: only those above one common size are made smaller.
    None for no place, for an image that is gone or broken, and for one that cannot be made to fit.
    """
    reader = _Reader(root)
    with ThreadPoolExecutor(READERS) as pool:
        pictures = list(pool.map(reader.picture, places))
        if sum(map(_length, pictures)) > limit:
            variants = list(pool.map(_variants, pictures))
            size = _common_size(variants, limit)
            pictures = [_best(found, size) for found in variants]
    return [_PREFIX + b64encode(data).decode() if data else None for data in pictures]


def _length(data: bytes) -> int:
    """Returns the characters of the data URI."""
    return len(_PREFIX) + 4 * math.ceil(len(data) / 3) if data else 0


def _common_size(variants: list[list[bytes]], limit: int) -> int:
    """Returns the largest size of a data URI at which the best variants up to it fit into `limit`."""
    low, high = 0, max(0, limit)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(_length(_best(found, middle)) for found in variants) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _best(variants: list[bytes], size: int) -> bytes:
    """Returns the first variant whose data URI has at most `size` characters, or nothing."""
    return next((data for data in variants if _length(data) <= size), b"")


def _variants(picture: bytes) -> list[bytes]:
    """Yields the picture and smaller ones of it, the largest first."""
    if not picture:
        return []
    image = Image.open(io.BytesIO(picture))
    return [picture, *(_jpeg(image, scale, quality) for scale, quality in _SMALLER)]


class _Reader:
    def __init__(self, root: str | None) -> None:
        self._reader = ImageReader(root)
        self._storage_fails = False

    def picture(self, place: Location | None) -> bytes:
        """Returns a JPEG file of one image; empty if it cannot be read.

        Nothing more is read once the storage has failed: waiting through its retries for hundreds of
        images would take an hour.
        """
        if place is None or self._storage_fails:
            return b""
        try:
            data = self._reader.read(place.image, place.container, place.offset, place.size)
            return _jpeg(_shrink(data), 1.0, _QUALITY)
        except Rejected:
            return b""
        except StorageError:
            self._storage_fails = True
            return b""


def _jpeg(image: Image.Image, scale: float, quality: int) -> bytes:
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    buffer = io.BytesIO()
    scaled = image if size == image.size else image.resize(size)
    scaled.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def _side(longest: int) -> int:
    """Returns the longest side of the picture of an image whose longest side is given."""
    if longest <= SIDE:
        return longest
    fractions = (math.ceil(longest / factor) for factor in (2, 4, 8))
    return next((side for side in fractions if SMALLEST_SIDE <= side <= SIDE), SIDE)


def _shrink(data: bytes) -> Image.Image:
    """Returns the upright image, small. Raises Rejected."""
    side = _side(max(open_image(data, ImageLimits()).size))
    prepared = prepare(data, side, "pad", fast=True)
    scale = side / max(prepared.width, prepared.height)
    left, right = _without_padding(side, prepared.width * scale)
    top, bottom = _without_padding(side, prepared.height * scale)
    return Image.fromarray(prepared.pixels).crop((left, top, right, bottom))


def _without_padding(side: int, length: float) -> tuple[int, int]:
    """Returns first and last pixel of the middle of `side`; one that is partly padding is cut."""
    first = math.ceil((side - length) / 2)
    return first, max(first + 1, math.floor((side + length) / 2))
