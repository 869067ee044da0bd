"""Parity with the released preprocessing, of which only the speed may differ."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.images import PAD_COLOUR, prepare, prepare_whole
from tests.commands import PHOTOS
from tests.images.samples import encode, picture

BICUBIC = Image.Resampling.BICUBIC
PROTOCOLS: tuple[ImageProtocol, ...] = ("pad", "crop", "squash")


def _released(data: bytes, size: int, protocol: ImageProtocol) -> npt.NDArray[np.int16]:
    """The released order of work: everything at full size, one resize, integer offsets rounded down."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if protocol == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if protocol == "crop":
        short = min(image.size)
        image = image.resize((int(size * image.width / short), int(size * image.height / short)), BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.array(image.resize((size, size), BICUBIC), dtype=np.int16)


def _difference(data: bytes, size: int, protocol: ImageProtocol, fast: bool = False) -> npt.NDArray[np.int16]:
    ours = prepare(data, size, protocol, fast=fast).pixels.astype(np.int16)
    difference: npt.NDArray[np.int16] = np.abs(ours - _released(data, size, protocol))
    return difference


def _textured(width: int, height: int) -> Image.Image:
    """Blobs with noise and hard stripes, so that a shift by a fraction of a pixel shows."""
    base = np.asarray(picture(width, height)).astype(np.int16)
    noise = np.random.default_rng(1).normal(0, 12, base.shape)
    stripes = 60 * (np.arange(width) // 9 % 2)[None, :, None]
    return Image.fromarray(np.clip(base + noise + stripes, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(101, 64), (64, 101), (64, 64), (40, 31), (31, 40), (130, 3), (3, 130)])
def test_below_six_times_the_target_it_is_the_released_result(
    protocol: ImageProtocol, size: tuple[int, int]
) -> None:
    difference = _difference(encode(_textured(*size), "PNG"), 48, protocol)
    # Tall images are filtered along their rows and columns in the other order, which rounds differently.
    assert difference.mean() <= (0.0 if size[0] >= size[1] and protocol == "pad" else 0.3)  # measured 0.25
    assert difference.max() <= 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(1500, 2250), (2251, 1501), (900, 800)])
def test_large_images_differ_by_less_than_one_step_on_average(
    protocol: ImageProtocol, size: tuple[int, int]
) -> None:
    assert _difference(encode(_textured(*size), "JPEG", quality=90), 128, protocol).mean() <= 0.7  # 0.52


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [(1500, 2250), (2251, 1501)])
def test_scaled_decoding_keeps_the_geometry(protocol: ImageProtocol, size: tuple[int, int]) -> None:
    # A shift by one pixel of the result gives 6 and more.
    assert _difference(encode(picture(*size), "JPEG", quality=90), 128, protocol, fast=True).mean() <= 1.0


def test_scaled_decoding_is_off_by_default_and_only_for_jpeg() -> None:
    jpeg, lossless = (encode(_textured(800, 600), kind) for kind in ("JPEG", "PNG"))
    exact = prepare(jpeg, 64, "pad").pixels
    assert (exact != prepare(jpeg, 64, "pad", fast=True).pixels).any()
    assert (prepare(lossless, 64, "pad").pixels == prepare(lossless, 64, "pad", fast=True).pixels).all()


def test_scaled_decoding_reports_the_size_of_the_file() -> None:
    got = prepare(encode(picture(801, 599), "JPEG"), 64, "crop", fast=True)
    assert (got.width, got.height) == (801, 599)


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (2000, 10), (10, 2000)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_thinnest_images_are_prepared(protocol: ImageProtocol, size: tuple[int, int]) -> None:
    for fast in (False, True):
        got = prepare(encode(Image.new("RGB", size, (9, 9, 9)), "JPEG"), 48, protocol, fast=fast)
        assert (got.width, got.height, got.pixels.shape) == (*size, (48, 48, 3))


def test_padding_has_the_mean_colour() -> None:
    got = prepare(encode(Image.new("RGB", (100, 50)), "PNG"), 48, "pad").pixels
    assert {tuple(got[row, column].tolist()) for row in (0, 5, 42, 47) for column in (0, 47)} == {
        (122, 116, 104)
    }
    assert got[16:32].max() == 0


def test_photographs_match_the_released_result() -> None:
    photos = sorted(PHOTOS.glob("*/*.jpg"))
    if not photos:
        pytest.skip("the photographs of shared/data/photos are not beside the repository")
    for photo in photos:
        for protocol in PROTOCOLS:
            assert _difference(photo.read_bytes(), 336, protocol).mean() <= 0.2  # measured 0.11


@pytest.mark.parametrize("size", [(97, 64), (640, 480), (2000, 11), (1, 1), (1, 150)])
def test_a_whole_image_keeps_its_shape_below_the_bound(size: tuple[int, int]) -> None:
    bound = 5_000
    prepared = prepare_whole(encode(picture(*size), "PNG"), bound)
    height, width, _ = prepared.pixels.shape
    assert (prepared.width, prepared.height) == size and width * height <= bound
    if size[0] * size[1] <= bound:
        assert (width, height) == size
    else:
        assert width * height > 0.9 * bound
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fast", [False, True])
def test_a_whole_image_is_upright(orientation: int, fast: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(320, 200), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    prepared = prepare_whole(data, 4_000, fast=fast)
    assert (prepared.width, prepared.height) == upright.size
    height, width, _ = prepared.pixels.shape
    wanted = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(prepared.pixels - wanted).mean() < 2
