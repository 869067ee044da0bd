"""Pictures that several tests encode, and the shortest way to look at an outcome."""

import importlib.util
import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.errors import Rejected
from sharegpt4v.images import prepare

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
"""Whether the extra `heic` is installed."""


def picture(width: int = 97, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth coloured blobs: no two corners alike, gentle enough for lossy formats."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def heic(image: Image.Image, **options: object) -> bytes:
    """HEIC as phones write it."""
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


def pixels(
    data: bytes, size: int = 48, protocol: ImageProtocol = "squash", fast: bool = False
) -> npt.NDArray[np.int16]:
    """Prepared pixels as signed numbers, so that they subtract."""
    return prepare(data, size, protocol, fast=fast).pixels.astype(np.int16)


def reason(data: bytes, fast: bool = False) -> str:
    """The code that `prepare` rejects the bytes with."""
    with pytest.raises(Rejected) as caught:
        prepare(data, 48, "pad", fast=fast)
    return caught.value.reason


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand: sizes that lie, bit depths and chunks that Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body
