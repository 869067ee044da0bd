"""Images that look odd but are fine, and what must come out of them."""

import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.errors import Rejected
from sharegpt4v.images import inspect, prepare
from tests.commands import PHOTOS
from tests.images.samples import HAS_HEIF, encode, heic, picture, pixels, png, png_chunk

INVERSE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def _flat(colour: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (16, 16), colour)


def _exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    value = struct.pack(order + "HHII" if kind == 4 else order + "HHIHxx", 0x0112, kind, 1, orientation)
    mark = b"II" if order == "<" else b"MM"
    return b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, 1) + value + bytes(4)


def _turned(orientation: int, upright: Image.Image) -> Image.Image:
    """The picture as a camera stores it under an orientation."""
    inverse = INVERSE[orientation]
    return upright if inverse is None else upright.transpose(inverse)


@pytest.mark.parametrize("protocol", ["pad", "crop", "squash"])
@pytest.mark.parametrize("orientation", INVERSE)
@pytest.mark.parametrize("size", [(101, 64), (64, 101), (640, 431)])
def test_exif_orientation_is_applied(
    protocol: ImageProtocol, orientation: int, size: tuple[int, int]
) -> None:
    upright = picture(*size)
    data = encode(_turned(orientation, upright), "PNG", exif=_exif(orientation))
    expected = prepare(encode(upright, "PNG"), 48, protocol)
    got = prepare(data, 48, protocol)
    assert (got.width, got.height) == size
    difference = np.abs(got.pixels.astype(int) - expected.pixels)
    # Pillow before 13 filters a file that lies on its side along rows and columns in the other order.
    rounding = 1 if orientation >= 5 else 0
    # Blocks are averaged from six times the target on, and they start at the other end of a turned file.
    assert difference.max() <= rounding if max(size) < 6 * 48 else difference.mean() <= 0.5  # measured 0.42
    assert inspect(data) == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("order", "field"), [("<", 3), (">", 3), (">", 4)])
def test_orientation_is_read_in_every_format_and_byte_order(kind: str, order: str, field: int) -> None:
    assert inspect(encode(picture(), kind, exif=_exif(6, order, field))) == (64, 97)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", _exif(9), _exif(6)[:20]]
)
def test_damaged_exif_means_upright_and_silent(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(encode(picture(), "JPEG", exif=exif)) == (97, 64)


def test_exif_with_damaged_other_fields_is_silent() -> None:
    entry = struct.pack("<HHII", 0x011A, 5, 1, 0x7FFFFFF0)  # XResolution far behind the end
    exif = b"Exif\0\0II" + struct.pack("<HIH", 42, 8, 1) + entry + bytes(4)
    start = encode(picture(), "JPEG")
    # No JFIF block, so that a decoder would look for the resolution here.
    data = start[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + start[20:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(data) == (97, 64)


def test_alpha_is_laid_on_white() -> None:
    half_red = _flat((255, 0, 0, 128), "RGBA")
    for kind in ("PNG", "WEBP"):
        data = encode(half_red, kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert np.abs(pixels(data, 16) - (255, 127, 127)).max() <= 1
    assert np.abs(pixels(encode(_flat((0, 128), "LA"), "PNG"), 16) - 127).max() <= 1


def test_palette_with_transparency_is_laid_on_white_and_silent() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_index = pixels(encode(image, "PNG", transparency=1), 2)
        by_table = pixels(encode(image, "PNG", transparency=bytes([0, 255, 255, 255])), 2)
        in_gif = pixels(encode(image, "GIF", transparency=3), 2)
    assert by_index.tolist() == [[[255, 0, 0], [255, 255, 255]], [[0, 0, 255], [9, 9, 9]]]
    assert by_table[0, 0].tolist() == [255, 255, 255]
    assert in_gif.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = Image.fromarray(np.arange(65_536, dtype=np.uint16).reshape(256, 256))
    got = prepare(encode(ramp, "PNG"), 256, "pad").pixels
    assert (got == np.arange(256, dtype=np.uint8)[:, None, None]).all()
    colour = b"".join(b"\0" + struct.pack(">HHH", 65_535, 32_768, 256) * 4 for _ in range(4))
    assert prepare(png(4, 4, 16, 2, colour), 4, "pad").pixels[0, 0].tolist() == [255, 128, 1]


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    rows = b"\0" + struct.pack(">HH", 0, 1000) + b"\0" + struct.pack(">HH", 1000, 65_535)
    key = png_chunk(b"tRNS", struct.pack(">H", 1000))
    assert pixels(png(2, 2, 16, 0, rows, key), 2)[..., 0].tolist() == [[0, 255], [255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_few_colours_come_out_as_rgb(mode: str, kind: str) -> None:
    image = picture(48, 48).convert(mode)
    assert (pixels(encode(image, kind)) == np.asarray(image.convert("RGB"))).all()


def test_grey_is_padded_in_colour() -> None:
    got = prepare(encode(Image.new("L", (48, 24), 7), "JPEG"), 48, "pad").pixels
    assert (got[0, 0].tolist(), got[24, 24].tolist()) == ([122, 116, 104], [7, 7, 7])


@pytest.mark.parametrize("adobe_transform", [0, 2], ids=["CMYK", "YCCK"])
def test_cmyk_jpeg_shows_its_colours(adobe_transform: int) -> None:
    image = _flat((200, 40, 90))
    # With 2 in its Adobe block, libjpeg takes the same four planes for YCCK.
    cmyk = np.asarray(image.convert("CMYK"))
    planes = Image.fromarray(cmyk[..., :3]).convert("YCbCr") if adobe_transform else None
    stored = np.dstack([255 - np.asarray(planes), cmyk[..., 3]]) if planes else cmyk
    data = encode(Image.fromarray(stored, "CMYK"), "JPEG", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    data = data[:at] + bytes([adobe_transform]) + data[at + 1 :]
    assert np.abs(pixels(data, 16) - (200, 40, 90)).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(kind: str) -> None:
    first, second = _flat((250, 10, 10)), _flat((10, 10, 250))
    data = encode(first, kind, save_all=True, append_images=[second])
    assert np.abs(pixels(data, 16) - (250, 10, 10)).max() <= 3


def test_mpo_is_read_as_its_first_picture() -> None:
    data = encode(_flat((250, 10, 10)), "MPO", save_all=True, append_images=[_flat((10, 10, 250))])
    assert np.abs(pixels(data, 16) - (250, 10, 10)).max() <= 3


def test_progressive_is_the_same_picture() -> None:
    plain, progressive = (encode(picture(), "JPEG", progressive=flag) for flag in (False, True))
    assert (pixels(plain) == pixels(progressive)).all()


def test_one_pixel() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        got = prepare(encode(Image.new("RGB", (1, 1), (99, 99, 99)), kind), 24, "pad")
        assert (got.width, got.height, got.pixels.shape) == (1, 1, (24, 24, 3))
        assert np.abs(got.pixels.astype(int) - 99).max() <= 2


def test_an_image_of_almost_the_pixel_limit_is_silent() -> None:
    # Pillow warns from 89 million pixels on.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(encode(Image.new("1", (10_000, 10_000)), "PNG"), 24, "pad").width == 10_000


def test_pixels_are_a_writable_contiguous_uint8_array() -> None:
    got = prepare(encode(picture(), "JPEG"), 48, "pad").pixels
    assert (got.shape, got.dtype, got.flags.c_contiguous, got.flags.writeable) == (
        (48, 48, 3),
        np.dtype(np.uint8),
        True,
        True,
    )


def test_threads_share_nothing() -> None:
    files = [encode(picture(seed=seed), kind) for seed in range(8) for kind in ("JPEG", "PNG", "WEBP", "GIF")]
    alone = [prepare(data, 48, "pad").pixels for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: prepare(data, 48, "pad").pixels, files * 4))
    assert all((got == alone[index % len(files)]).all() for index, got in enumerate(together))


def test_real_photographs_are_read() -> None:
    photos = sorted(PHOTOS.glob("*/*.jpg"))
    if not photos:
        pytest.skip("the photographs of shared/data/photos are not beside the repository")
    for photo in photos:
        data = photo.read_bytes()
        for percent in (10, 50, 99):
            with pytest.raises(ValueError, match="truncated"):
                inspect(data[: len(data) * percent // 100])
        with Image.open(photo) as image:
            assert inspect(data) == image.size


@pytest.mark.skipif(not HAS_HEIF, reason="HEIC needs the extra `heic` (pillow-heif)")
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_photograph_of_a_phone_is_upright(orientation: int) -> None:
    upright = picture(96, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = heic(_turned(orientation, upright), quality=95, exif=exif.tobytes())
    assert prepare(data, 48, "squash").width == 96
    assert np.abs(pixels(data) - pixels(encode(upright, "PNG"))).mean() < 6


def test_an_avif_with_alpha_is_laid_on_white() -> None:
    image = picture(64, 64).convert("RGBA")
    image.putalpha(0)
    assert pixels(encode(image, "AVIF", quality=95)).min() > 245


def test_heic_without_its_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x10meta" + b"\0" * 8
    with pytest.raises(Rejected, match="pip install pillow-heif") as caught:
        prepare(data, 48, "pad")
    assert caught.value.reason == "unsupported_format"
