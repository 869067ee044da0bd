"""What a file is, and whether it is whole and of sane size, judged from its bytes before a pixel is decoded.

Decoders are lenient: a GIF cut in its second frame or a PNG without its end still yields a picture. A
cut file is a failed download, though, so the container of each format is walked to its end here.
"""

import struct
from dataclasses import dataclass
from typing import Literal

from sharegpt4v.errors import Rejected

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"]

SUPPORTED = "JPEG, PNG, WebP, GIF, BMP or AVIF"

_BRANDS: dict[bytes, Format] = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"),
}
"""Brands of ISO media files (ISO/IEC 23008-12) that name the codec of a still image or a sequence."""

_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"SIMPLE  =", "FITS"),
    (b"%PDF", "PDF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "ICO"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"v/1\x01", "OpenEXR"),
    (b"P1\n", "PBM"),
    (b"P2\n", "PGM"),
    (b"P3\n", "PPM"),
    (b"P4\n", "PBM"),
    (b"P5\n", "PGM"),
    (b"P6\n", "PPM"),
)

_SMALLEST = 24
"""Bytes; no whole image of any of the formats is as small."""

_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})
_MAX_PNG_CHUNKS = 100_000
_MAX_GIF_BLOCKS = 2_000_000
_MAX_JPEG_SCANS = 500
"""Encoders write about ten scans; each scan passes over the whole image again, however few bytes it has."""


@dataclass(frozen=True)
class ImageLimits:
    """The largest image that is decoded; all limits are inclusive.

    max_side, max_pixels: pixels. max_aspect: long side over short side. max_bytes: the file's size.
    """

    max_side: int = 20_000
    max_pixels: int = 100_000_000
    max_aspect: float = 200.0
    max_bytes: int = 256 * 1024 * 1024

    def check_bytes(self, count: int) -> None:
        """Raises Rejected (empty, too_large) for a file of `count` bytes."""
        if count == 0:
            raise Rejected("empty", "the file has 0 bytes")
        if count > self.max_bytes:
            raise Rejected("too_large", f"the file has {count:,} bytes, the limit is {self.max_bytes:,}")

    def check_size(self, width: int, height: int) -> None:
        """Raises Rejected (corrupt, too_large, bad_aspect) for the size that a header promises."""
        size = f"{width}x{height}"
        if width < 1 or height < 1:
            raise Rejected("corrupt", f"the header promises {size} pixels")
        if max(width, height) > self.max_side:
            raise Rejected("too_large", f"{size}: a side is over {self.max_side:,} pixels")
        if width * height > self.max_pixels:
            raise Rejected(
                "too_large", f"{size}: {width * height:,} pixels, the limit is {self.max_pixels:,}"
            )
        if max(width, height) > self.max_aspect * min(width, height):
            raise Rejected("bad_aspect", f"{size}: the aspect is over 1:{self.max_aspect:g}")


def check_file(data: bytes, limits: ImageLimits) -> Format:
    """Returns the format of `data` by its first bytes, whatever the file was called.

    Checks the byte count and, where a decoder would be lenient or allocate early (PNG, GIF, WebP),
    the container. Raises Rejected: empty, too_large, unsupported_format, not_an_image, truncated,
    corrupt, bad_aspect, bomb.
    """
    limits.check_bytes(len(data))
    kind = _identify(data)
    if len(data) < _SMALLEST:
        raise Rejected("truncated", f"{kind} data of {len(data)} bytes is cut inside its header")
    try:
        if kind == "PNG":
            _walk_png(data)
        elif kind == "GIF":
            limits.check_size(*_walk_gif(data))
        elif kind == "WEBP":
            limits.check_size(*_walk_webp(data))
        elif kind in ("AVIF", "HEIF"):
            _walk_boxes(data, kind)
    except (struct.error, IndexError) as error:
        raise Rejected("truncated", f"{kind} data ends after {len(data):,} bytes, inside a block") from error
    return kind


def check_scans(data: bytes) -> None:
    """Raises Rejected (bomb) for a progressive JPEG with an absurd number of passes over the image."""
    # Entropy-coded data never holds ff da: every ff byte in it is followed by 00 or a restart marker.
    scans = data.count(b"\xff\xda")
    if scans > _MAX_JPEG_SCANS:
        raise Rejected("bomb", f"progressive JPEG with {scans:,} scans, the limit is {_MAX_JPEG_SCANS}")


def _identify(data: bytes) -> Format:
    for magic, kind in _MAGIC:
        if data.startswith(magic) and (kind != "BMP" or _is_bmp(data)):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and len(data) < _SMALLEST:
        raise Rejected("truncated", f"ISO media data of {len(data)} bytes is cut inside its header")
    if data[4:8] == b"ftyp" and (brand := _brand(data)):
        return brand
    refused = _name_refused(data)
    if refused:
        raise Rejected("unsupported_format", f"{refused} is not read, convert it to {SUPPORTED}")
    raise Rejected("not_an_image", f"{_describe(data)} is not a {SUPPORTED} file")


def _brand(data: bytes) -> Format | None:
    """Returns the format of an ISO media file: its major brand, else the first compatible one we know."""
    end = min(int.from_bytes(data[:4], "big"), 512)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)


def _is_bmp(data: bytes) -> bool:
    return len(data) < 18 or int.from_bytes(data[14:18], "little") in _BMP_HEADERS


def _name_refused(data: bytes) -> str | None:
    for magic, name in _REFUSED:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return "an ISO media file with another codec (a video, for example)"
    head = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (
        head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in head
    ):
        return "SVG"
    return None


def _describe(data: bytes) -> str:
    head = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if head.startswith((b"{", b"[")):
        return "JSON text"
    # No bytes of the file in the message: it may be anything, a secret too, and messages are published.
    return f"a file of {len(data):,} bytes with an unknown signature"


def _walk_png(data: bytes) -> None:
    position = 8
    animated = False
    for _ in range(_MAX_PNG_CHUNKS):
        length, name = struct.unpack_from(">I4s", data, position)
        if not name.isalpha():
            raise Rejected("corrupt", f"PNG chunk at byte {position:,} has no valid name")
        if name == b"acTL":
            (frames,) = struct.unpack_from(">I", data, position + 8)
            if animated or not 1 <= frames <= 2**31:  # Pillow would print a warning
                raise Rejected(
                    "corrupt", f"PNG with a second or impossible animation header ({frames:,} frames)"
                )
            animated = True
        position += 12 + length
        if position > len(data):
            raise Rejected(
                "truncated", f"PNG data ends after {len(data):,} bytes, the chunk needs {position:,}"
            )
        if name == b"IEND":
            return
    raise Rejected("bomb", f"PNG with over {_MAX_PNG_CHUNKS:,} chunks")


def _walk_gif(data: bytes) -> tuple[int, int]:
    """Returns the canvas size, grown as decoders grow it when the first frame reaches beyond."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _gif_palette(flags)
    first = True
    for _ in range(_MAX_GIF_BLOCKS):
        marker = data[position]
        if marker == 0x3B:
            return width, height
        if marker == 0x2C:
            left, top, across, down, flags = struct.unpack_from("<HHHHB", data, position + 1)
            if first:
                width, height, first = max(width, left + across), max(height, top + down), False
            position = _skip_gif_blocks(data, position + 11 + _gif_palette(flags))
        else:
            position = _skip_gif_blocks(data, position + 2) if marker == 0x21 else position + 1
    raise Rejected("bomb", f"GIF with over {_MAX_GIF_BLOCKS:,} blocks")


def _gif_palette(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_gif_blocks(data: bytes, position: int) -> int:
    while length := data[position]:
        position += length + 1
    return position + 1


def _walk_webp(data: bytes) -> tuple[int, int]:
    promised = struct.unpack_from("<I", data, 4)[0] + 8
    if len(data) < promised:
        raise Rejected("truncated", f"WebP data ends after {len(data):,} of {promised:,} bytes")
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise Rejected("corrupt", "WebP data starts with an unknown chunk")


def _walk_boxes(data: bytes, kind: str) -> None:
    """Follows the top-level boxes to the end of the file: one that reaches beyond it means a cut file."""
    position = 0
    names = set()
    while position < len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
        elif size == 0:  # the last box, up to the end
            size = len(data) - position
        if size < 8:
            raise Rejected("corrupt", f"{kind} box at byte {position:,} has {size} bytes")
        names.add(name)
        position += size
    if position > len(data):
        raise Rejected("truncated", f"{kind} data ends after {len(data):,} of {position:,} bytes")
    if b"meta" not in names and b"moov" not in names:
        raise Rejected("truncated", f"{kind} data of {len(data):,} bytes ends before its description")
