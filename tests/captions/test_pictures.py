"""Pictures inside a page: as good as they fit, upright, and never larger than allowed."""

import io
from base64 import b64decode
from pathlib import Path

import pytest
from PIL import Image

from sharegpt4v.captions import pictures
from sharegpt4v.captions.parts import Location
from sharegpt4v.captions.pictures import SIDE, embedded
from sharegpt4v.images import StorageError


def _place(name: str) -> Location:
    return Location(name, "", 0, -1)


def _opened(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(b64decode(uri.partition(",")[2])))


def _noise(path: Path, size: tuple[int, int]) -> None:
    Image.effect_noise(size, 90).convert("RGB").save(path, quality=95)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((64, 48), (64, 48)),  # never enlarged
        ((600, 450), (560, 420)),
        ((800, 600), (400, 300)),  # half of the file: decoded at a third of the cost
        ((4000, 300), (500, 37)),
        ((300, 1900), (75, 475)),
    ],
)
def test_a_picture_is_as_large_as_a_page_shows_it(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    Image.new("RGB", size, "teal").save(tmp_path / "a.jpg")
    found = _opened(embedded(str(tmp_path), [_place("a.jpg")], 10**6)[0]).size
    assert max(abs(found[0] - shown[0]), abs(found[1] - shown[1])) <= 1 and max(found) <= SIDE


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "a.jpg", exif=exif)
    assert _opened(embedded(str(tmp_path), [_place("a.jpg")], 10**6)[0]).size == (200, 300)


def test_pictures_that_need_little_leave_room_for_others(tmp_path: Path) -> None:
    Image.new("RGB", (560, 560), "teal").save(tmp_path / "plain.jpg")
    _noise(tmp_path / "noise.jpg", (560, 560))
    places = [_place("plain.jpg")] * 9 + [_place("noise.jpg")]
    free = embedded(str(tmp_path), places, 10**7)
    needed = sum(len(uri or "") for uri in free)

    tight = embedded(str(tmp_path), places, needed - 1)
    assert [_opened(uri).size for uri in tight] == [(560, 560)] * 10
    assert tight[:9] == free[:9] and len(tight[9] or "") < len(free[9] or "")  # the large one alone gives way


@pytest.mark.parametrize("limit", [0, 5_000, 60_000, 400_000])
def test_all_together_fit_into_the_limit(tmp_path: Path, limit: int) -> None:
    for number in range(6):
        _noise(tmp_path / f"{number}.jpg", (500, 100 + 80 * number))
    uris = embedded(str(tmp_path), [_place(f"{number}.jpg") for number in range(6)], limit)

    assert sum(len(uri or "") for uri in uris) <= limit
    assert sum(uri is not None for uri in uris) == {0: 0, 5_000: 4}.get(limit, 6)


def test_what_cannot_be_read_has_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"<html>not an image")
    places = [_place("text.jpg"), _place("gone.jpg"), _place("../text.jpg"), None]
    assert embedded(str(tmp_path), places, 10**6) == [None] * 4


def test_a_storage_that_fails_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Failing:
        def __init__(self, root: str | None) -> None: ...

        def read(self, *place: object) -> bytes:
            asked.append(place)
            raise StorageError("503")

    monkeypatch.setattr(pictures, "ImageReader", Failing)
    monkeypatch.setattr(pictures, "READERS", 1)
    assert embedded("s3://bucket", [_place("a")] * 20, 10**6) == [None] * 20
    assert len(asked) == 1
