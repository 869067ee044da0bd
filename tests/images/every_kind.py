"""A folder with every bad and every odd but good image file that the platform promises to handle."""

import os
import zlib
from pathlib import Path

from PIL import Image

from tests.images.samples import encode, picture, png, png_chunk

BLACK_ROWS = b"".join(b"\0" + bytes(12) for _ in range(4))

BAD = {
    "empty.jpg": "empty",
    "one byte.jpg": "not_an_image",
    "cut at 10.jpg": "truncated",
    "cut at 50.png": "truncated",
    "cut at 99.webp": "truncated",
    "page.jpg": "not_an_image",
    "error.jpg": "not_an_image",
    "tiff.jpg": "unsupported_format",
    "eps.jpg": "unsupported_format",
    "fits.jpg": "unsupported_format",
    "svg.png": "unsupported_format",
    "pdf.png": "unsupported_format",
    "promises 30000x30000.png": "too_large",
    "side.png": "too_large",
    "area.png": "too_large",
    "aspect.png": "bad_aspect",
    "text bomb.png": "bomb",
    "dangling.jpg": "missing",
    "link out of the root.jpg": "outside_root",
    "pipe.jpg": "unreadable",
}
"""File name to the reason it is rejected with."""


def write_bad(folder: Path, outside: Path) -> None:
    """Writes all of BAD. outside: an existing file that is not below the folder, for a link to it."""
    picture_bytes = {kind: encode(picture(seed=1), kind) for kind in ("JPEG", "PNG", "WEBP")}
    content = {
        "empty.jpg": b"",
        "one byte.jpg": b"\xff",
        "cut at 10.jpg": picture_bytes["JPEG"][: len(picture_bytes["JPEG"]) // 10],
        "cut at 50.png": picture_bytes["PNG"][: len(picture_bytes["PNG"]) // 2],
        "cut at 99.webp": picture_bytes["WEBP"][: len(picture_bytes["WEBP"]) * 99 // 100],
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "error.jpg": b'{"error": "rate limited"}',
        "tiff.jpg": encode(picture(), "TIFF"),
        "eps.jpg": encode(picture(), "EPS"),
        "fits.jpg": b"SIMPLE  =                    T" + b" " * 80,
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pdf.png": encode(picture(), "PDF"),
        "promises 30000x30000.png": png(30_000, 30_000, 8, 2, b""),
        "side.png": png(20_001, 200, 8, 2, b""),
        "area.png": png(10_001, 10_000, 8, 2, b""),
        "aspect.png": png(201, 1, 8, 2, b""),
        "text bomb.png": png(
            4, 4, 8, 2, BLACK_ROWS, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "link out of the root.jpg").symlink_to(outside)
    os.mkfifo(folder / "pipe.jpg")


def write_odd(folder: Path) -> list[str]:
    """Writes images that must work, no two alike. Returns their paths below `folder`, sorted."""
    pictures = (picture(seed=seed) for seed in range(100, 200))
    content = {
        "CMYK.jpg": encode(next(pictures).convert("CMYK"), "JPEG"),
        "YCCK.jpg": _as_ycck(encode(next(pictures).convert("CMYK"), "JPEG")),
        "16 bit.png": encode(Image.new("I;16", (32, 24), 40_000), "PNG"),
        "palette.png": encode(next(pictures).convert("P"), "PNG"),
        "alpha.png": encode(next(pictures).convert("RGBA"), "PNG"),
        "grey.jpg": encode(next(pictures).convert("L"), "JPEG"),
        "animated.gif": encode(
            next(pictures).convert("P"), "GIF", save_all=True, append_images=[next(pictures)]
        ),
        "progressive.jpg": encode(next(pictures), "JPEG", progressive=True),
        "phone.jpg": encode(next(pictures), "MPO", save_all=True, append_images=[next(pictures)]),
        "PNG inside.jpg": encode(next(pictures), "PNG"),
        "1x1.png": encode(Image.new("RGB", (1, 1), "teal"), "PNG"),
        "bitmap.bmp": encode(next(pictures), "BMP"),
        "lossless.webp": encode(next(pictures), "WEBP", lossless=True),
        "ünï 漢字.jpg": encode(next(pictures), "JPEG"),
        "quote'\".jpg": encode(next(pictures), "JPEG"),
        "new\nline.jpg": encode(next(pictures), "JPEG"),
        "right-to-left \u202egpj.jpg": encode(next(pictures), "JPEG"),
        "#?%2e &.JPG": encode(next(pictures), "JPEG"),
        "[bold] markup.jpg": encode(next(pictures), "JPEG"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content[f"turned {orientation}.jpg"] = encode(next(pictures), "JPEG", exif=exif)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "target.jpg").write_bytes(encode(next(pictures), "JPEG"))
    return sorted([*content, "target.jpg"])


def _as_ycck(cmyk: bytes) -> bytes:
    """With 2 in its Adobe block, decoders take the same four planes for YCCK."""
    at = cmyk.index(b"Adobe") + 11
    return cmyk[:at] + b"\2" + cmyk[at + 1 :]
