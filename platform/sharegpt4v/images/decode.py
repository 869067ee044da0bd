"""From bytes to an RGB or grey Pillow image, with every failure turned into a named reject."""

import importlib.util
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from sharegpt4v.errors import Rejected
from sharegpt4v.images.formats import Format, ImageLimits, check_file, check_scans

_ORIENTATION_TAG = 0x0112


class _Jpeg(JpegImageFile):
    # Phone pictures carry an EXIF block that is often damaged. Pillow parses all of it for the
    # resolution, which costs 0.1 ms and prints warnings; only the orientation is of use here.
    def _read_dpi_from_exif(self) -> None:
        return


def _open_heif(file: IO[bytes]) -> ImageFile.ImageFile:
    if importlib.util.find_spec("pillow_heif") is None:
        raise Rejected(
            "unsupported_format",
            "HEIC needs pillow-heif: pip install pillow-heif, or convert it to JPEG",
        )
    from pillow_heif import HeifImageFile

    opener: Callable[[IO[bytes]], ImageFile.ImageFile] = HeifImageFile
    return opener(file)


# Pillow's classes are used directly: Image.open would print a warning from 89 million pixels on and
# ask whatever other plugins the process has registered. MPO is a JPEG with more JPEGs behind it.
_OPENERS: dict[Format, Callable[[IO[bytes]], ImageFile.ImageFile]] = {
    "JPEG": _Jpeg,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "AVIF": AvifImageFile,
    "HEIF": _open_heif,
}


def open_image(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """Reads the header only and checks the size against the limits. Raises Rejected."""
    kind = check_file(data, limits)
    with rejecting(data, kind):
        image = _OPENERS[kind](io.BytesIO(data))
    limits.check_size(*image.size)
    if "progressive" in image.info:
        check_scans(data)
    return image


def load(image: ImageFile.ImageFile, data: bytes) -> None:
    """Decodes the pixels (of the first frame) of an image that open_image gave. Raises Rejected."""
    with rejecting(data, image.format or ""):
        image.load()


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation 1-8 of a loaded image; 1 where there is none or it is damaged."""
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == _ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def to_rgb_or_grey(image: Image.Image) -> Image.Image:
    """Converts a loaded image to mode RGB or L: alpha over white, the high byte of 16 bits."""
    if image.mode.startswith("I"):
        return _grey_from_16_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    # convert("L") would clip everything above 255 to white.
    values = np.array(image, dtype=np.int32)
    transparent = image.info.get("transparency")
    if transparent is not None:
        values[values == transparent] = 0xFFFF
    return Image.fromarray((values >> 8).astype(np.uint8))


@contextmanager
def rejecting(data: bytes, kind: str) -> Iterator[None]:
    """Turns whatever hostile bytes make Pillow, or us, raise into Rejected: one image must not end a run.

    Nested, the innermost names the format.
    """
    try:
        yield
    except Rejected:
        raise
    except MemoryError as error:
        raise Rejected("out_of_memory", f"{kind} of {len(data):,} bytes did not fit in memory") from error
    except Exception as error:
        raise Rejected(_reason(error, data, kind), f"{kind}: {str(error) or type(error).__name__}") from error


def _reason(error: Exception, data: bytes, kind: str) -> str:
    text = str(error).lower()
    if "too large" in text or "too much memory" in text:
        return "bomb"  # a compressed text or profile chunk that unpacks past Pillow's bounds
    # A JPEG cut in its header fails in many ways; a whole one ends with its end marker.
    cut = kind == "JPEG" and not data.rstrip(b"\0").endswith(b"\xff\xd9")
    return "truncated" if cut or "truncated" in text else "corrupt"
