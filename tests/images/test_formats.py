"""Bytes that must be refused, each with the reason that a summary counts it by."""

import struct
import zlib

import pytest
from PIL import Image

from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageLimits, inspect, prepare
from tests.images.samples import HAS_HEIF, encode, heic, picture, png, png_chunk, reason

PLAIN = picture()
FILES = {
    "jpeg": encode(PLAIN, "JPEG"),
    "progressive": encode(PLAIN, "JPEG", progressive=True),
    "cmyk": encode(PLAIN.convert("CMYK"), "JPEG"),
    "large jpeg": encode(picture(800, 600), "JPEG"),
    "png": encode(PLAIN, "PNG"),
    "gif": encode(PLAIN, "GIF"),
    "animated gif": encode(PLAIN, "GIF", save_all=True, append_images=[picture(seed=1), picture(seed=2)]),
    "webp": encode(PLAIN, "WEBP"),
    "lossless webp": encode(PLAIN, "WEBP", lossless=True),
    "animated webp": encode(PLAIN, "WEBP", save_all=True, append_images=[picture(seed=1)]),
    "bmp": encode(PLAIN, "BMP"),
    "avif": encode(PLAIN, "AVIF"),
    "animated avif": encode(PLAIN, "AVIF", save_all=True, append_images=[picture(seed=1)]),
    **({"heic": heic(PLAIN)} if HAS_HEIF else {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_accepted(name: str) -> None:
    assert inspect(FILES[name]) == ((800, 600) if name == "large jpeg" else PLAIN.size)


@pytest.mark.parametrize("percent", [10, 50, 99])
@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_truncated(name: str, percent: int) -> None:
    data = FILES[name]
    assert reason(data[: len(data) * percent // 100]) == "truncated"


def test_scaled_decoding_also_sees_the_cut() -> None:
    data = FILES["large jpeg"]
    assert [reason(data[: len(data) * percent // 100], fast=True) for percent in (10, 50, 99)] == [
        "truncated"
    ] * 3


@pytest.mark.parametrize("name", FILES)
def test_four_missing_bytes_are_noticed(name: str) -> None:
    assert reason(FILES[name][:-4]) == "truncated"


@pytest.mark.parametrize("name", FILES)
def test_any_short_prefix_is_a_named_reject(name: str) -> None:
    for length in range(1, 64):
        assert reason(FILES[name][:length]) in {"not_an_image", "truncated"}


def test_bytes_overwritten_inside_are_a_named_reject_or_a_picture() -> None:
    for data in FILES.values():
        for at in range(20, len(data) - 4, len(data) // 40 + 1):
            try:
                prepare(data[:at] + b"\xff\x00\x7f\xff" + data[at + 4 :], 48, "pad")
            except Rejected as rejected:
                assert rejected.reason in {"corrupt", "truncated", "too_large", "bad_aspect", "bomb"}


def test_empty_and_one_byte() -> None:
    assert [reason(b""), reason(b"\xff"), reason(b"B")] == ["empty", "not_an_image", "not_an_image"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "an HTML page"),
        (b'\xef\xbb\xbf{"error": "rate limited"}', "JSON text"),
        (b"BM is how this sentence of plain text starts", "unknown signature"),
    ],
)
def test_a_page_saved_as_an_image_is_not_an_image(data: bytes, name: str) -> None:
    with pytest.raises(Rejected, match=name) as caught:
        inspect(data)
    assert caught.value.reason == "not_an_image"


def test_the_message_never_quotes_an_unknown_file() -> None:
    with pytest.raises(Rejected) as caught:
        inspect(b"password=hunter2 and more of a secret file")
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(PLAIN, "TIFF"), "TIFF"),
        (encode(PLAIN, "EPS"), "EPS"),
        (encode(PLAIN, "PDF"), "PDF"),
        (encode(PLAIN, "JPEG2000"), "JPEG 2000"),
        (encode(PLAIN, "ICO"), "ICO"),
        (encode(PLAIN, "PPM"), "PPM"),
        (b"SIMPLE  =                    T" + b" " * 80, "FITS"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg/>", "SVG"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 40, "another codec"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    with pytest.raises(Rejected, match=name) as caught:
        inspect(data)
    assert caught.value.reason == "unsupported_format"


@pytest.mark.parametrize(
    ("width", "height", "code"),
    [
        (30_000, 30_000, "too_large"),
        (20_001, 20_001, "too_large"),
        (20_001, 200, "too_large"),
        (10_001, 10_000, "too_large"),
        (201, 1, "bad_aspect"),
        (1, 201, "bad_aspect"),
        (0, 5, "corrupt"),
    ],
)
def test_a_promised_size_is_refused_before_decoding(width: int, height: int, code: str) -> None:
    # The data holds no pixels: had decoding begun, it would have been called truncated.
    assert reason(png(width, height, 8, 2, b"")) == code


def test_limits_are_inclusive() -> None:
    assert inspect(encode(Image.new("L", (200, 1)), "PNG")) == (200, 1)
    limits = ImageLimits(max_side=97, max_pixels=97 * 64, max_bytes=len(FILES["png"]))
    assert inspect(FILES["png"], limits) == (97, 64)
    with pytest.raises(Rejected, match="6,208 pixels, the limit is 6,207"):
        inspect(FILES["png"], ImageLimits(max_pixels=97 * 64 - 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_every_format_obeys_the_limits(kind: str) -> None:
    for image in (PLAIN, PLAIN.convert("RGBA") if kind == "WEBP" else PLAIN):
        with pytest.raises(Rejected) as caught:
            inspect(encode(image, kind), ImageLimits(max_side=96))
        assert caught.value.reason == "too_large"


@pytest.mark.parametrize("frame_size", [(65_535, 64), (97, 65_535)])
def test_a_frame_beyond_its_gif_canvas_obeys_the_limits(frame_size: tuple[int, int]) -> None:
    data = bytearray(FILES["gif"])
    frame = 13 + 3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 13
    while data[frame] != 0x2C:
        frame += 1
    struct.pack_into("<HH", data, frame + 5, *frame_size)
    assert reason(bytes(data)) == "too_large"


def test_more_bytes_than_allowed_are_not_looked_at() -> None:
    with pytest.raises(Rejected, match="1,000 bytes, the limit is 999") as caught:
        inspect(b"?" * 1000, ImageLimits(max_bytes=999))
    assert caught.value.reason == "too_large"


ROWS = b"".join(b"\0" + bytes(12) for _ in range(4))


@pytest.mark.parametrize(
    "chunks",
    [
        [png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))],
        [png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))],
        [png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50_000_000)))],
        [png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_000_000))] * 70,
        [png_chunk(b"abCd", b"")] * 100_001,
    ],
    ids=["zTXt", "iTXt", "iCCP", "many texts", "many chunks"],
)
def test_png_chunk_bombs(chunks: list[bytes]) -> None:
    assert reason(png(4, 4, 8, 2, ROWS, *chunks)) == "bomb"


def test_a_text_bomb_behind_the_pixels() -> None:
    data = png(4, 4, 8, 2, ROWS)
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    assert reason(data[:-12] + bomb + data[-12:]) == "bomb"


def test_a_jpeg_with_thousands_of_scans_is_a_bomb() -> None:
    data = FILES["progressive"]
    scan = data.rindex(b"\xff\xda")
    assert reason(data[:scan] + data[scan:-2] * 2000 + data[-2:]) == "bomb"


def test_a_palette_image_without_its_palette_is_corrupt() -> None:
    # Pillow decodes the indices and fails when they are turned into colours.
    data = png(4, 4, 8, 3, b"".join(b"\0" + bytes(4) for _ in range(4)))
    assert reason(data) == "corrupt"
    with pytest.raises(Rejected, match="corrupt"):  # `check` says what `caption` will do
        inspect(data)
