"""Decode called as a plain object: one row an image, in order, whatever happens to it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.steps.decoding import Decode, decoded_schema, pixels_of
from pipelines.steps.isolation import RunStopped
from pipelines.steps.ledger import Ledger
from pipelines.steps.pixel_memory import pixel_memory
from pipelines.steps.storage_faults import JUDGED_AFTER, PUT_OFF
from sharegpt4v.dialogue import SquareImages, WholeImages
from sharegpt4v.images import ImageReader, prepare, prepare_whole, storage
from tests.commands import write_images
from tests.pipelines.steps.pending_rows import pending_rows

SIZE = 8


def _pixels(table: pa.Table) -> Any:
    return table["pixels"].chunk(0).to_numpy_ndarray()


def test_decode_keeps_the_order_and_gives_one_row_an_image(tmp_path: Path) -> None:
    write_images(tmp_path, ["b.jpg", "a.jpg"])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-50])
    decode = Decode(ImageReader(str(tmp_path)), SquareImages(SIZE, "squash"), False, Ledger(1.0))
    pending = pending_rows("b.jpg", "gone.jpg", "cut.jpg", "a.jpg")
    out = decode(pending)
    assert out.schema == decoded_schema(SquareImages(SIZE, "squash"))
    for name in ("shard", "row", "id", "image", "source"):
        assert out[name].to_pylist() == pending[name].to_pylist()
    assert out["reason"].to_pylist() == [None, "missing", "truncated", None]
    pixels = _pixels(out)
    for row, name in ((0, "b.jpg"), (3, "a.jpg")):
        data = (tmp_path / name).read_bytes()
        prepared = prepare(data, SIZE, "squash")
        assert (pixels[row] == prepared.pixels).all()
        assert (
            (out["width"][row].as_py(), out["height"][row].as_py())
            == (prepared.width, prepared.height)
            == (24, 24)
        )
        assert out["image_sha256"][row].as_py() == hashlib.sha256(data).hexdigest()
    assert pixels.dtype == np.uint8 and pixels.shape == (4, SIZE, SIZE, 3)
    assert not pixels[1:3].any()


def test_what_memory_held_before_shows_nowhere(tmp_path: Path) -> None:
    """Decoders use their memory again: not while a batch is looked at, and never as pixels of a reject."""
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    decode = Decode(ImageReader(str(tmp_path)), SquareImages(SIZE, "squash"), False, Ledger(1.0))
    first = decode(pending_rows("a.jpg", "b.jpg"))
    expected = _pixels(first).copy()
    second = decode(pending_rows("c.jpg", "c.jpg"))
    assert (_pixels(first) == expected).all() and (_pixels(second) != expected).any()
    del second
    pixel_memory((2, SIZE, SIZE, 3))[:] = 7  # what the next batch finds there
    rejected = decode(pending_rows("gone.jpg", "a.jpg"))
    assert not _pixels(rejected)[0].any() and (_pixels(rejected)[1] == expected[0]).all()


def test_a_file_that_is_read_but_not_decoded_keeps_its_digest(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    out = Decode(ImageReader(str(tmp_path)), SquareImages(SIZE, "pad"), False, Ledger(1.0))(
        pending_rows("page.jpg", "gone")
    )
    assert out["image_sha256"].to_pylist() == [hashlib.sha256(b"<html>not found</html>").hexdigest(), ""]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DELAYS", ())


DEAD = "http://127.0.0.1:9/{}.jpg"
"""Nobody listens there."""


def test_an_image_whose_storage_fails_is_put_off_and_the_others_are_decoded(
    impatient: None, tmp_path: Path
) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    ledger = Ledger(1.0)
    out = Decode(ImageReader(str(tmp_path)), SquareImages(SIZE, "pad"), False, ledger)(
        pending_rows("a.jpg", DEAD.format(0), "gone.jpg", "b.jpg")
    )
    assert out["reason"].to_pylist() == [None, PUT_OFF, "missing", None]
    assert not _pixels(out)[1].any() and out["image_sha256"][1].as_py() == ""
    assert list(ledger.faults()) == [f"id of {DEAD.format(0)}"]
    assert "1 try failed" in out["message"][1].as_py() and ledger.tally().put_off == 1


def test_many_faults_end_the_run_only_when_most_of_a_sample_cannot_be_read(
    impatient: None, tmp_path: Path
) -> None:
    write_images(tmp_path, ["a.jpg"])
    rows = pending_rows("a.jpg", *(DEAD.format(number) for number in range(JUDGED_AFTER)))
    good, bad = ("a.jpg", "", 0, -1), (DEAD.format("x"), "", 0, -1)
    reader = ImageReader(str(tmp_path))
    ledger = Ledger(1.0)
    out = Decode(reader, SquareImages(SIZE, "pad"), False, ledger, [bad, good, bad, good, good])(rows)
    assert out["reason"].to_pylist() == [None] + [PUT_OFF] * JUDGED_AFTER and ledger.tally().dead is None
    with pytest.raises(RunStopped, match="127.0.0.1:9/x.jpg"):
        Decode(reader, SquareImages(SIZE, "pad"), False, ledger, [bad, good, bad, good, bad])(rows)
    assert "127.0.0.1:9/x.jpg" in (ledger.tally().dead or "")
    with pytest.raises(RunStopped, match="127.0.0.1:9/x.jpg"):  # nothing more begins
        Decode(reader, SquareImages(SIZE, "pad"), False, ledger)(pending_rows("a.jpg"))


def test_an_image_that_killed_its_decoder_is_not_touched_again(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "poison.jpg"])
    ledger = Ledger(1.0)
    for worker in ("first", "second", "third"):
        ledger.begin(worker, ["decode:id of poison.jpg"])
        ledger.begin_alone(worker, "decode:id of poison.jpg")
    decode = Decode(ImageReader(str(tmp_path)), SquareImages(SIZE, "pad"), False, ledger)
    out = decode(pending_rows("poison.jpg", "a.jpg"))
    assert out["reason"].to_pylist() == ["killed_worker", None]
    assert out["image_sha256"][0].as_py() == ""


def test_whole_images_keep_their_shape_and_become_no_larger_than_asked(tmp_path: Path) -> None:
    Image.new("RGB", (60, 20), (200, 10, 10)).save(tmp_path / "wide.png")
    Image.new("RGB", (7, 30), (10, 200, 10)).save(tmp_path / "small.png")
    shape = WholeImages(max_pixels=300)
    decode = Decode(ImageReader(str(tmp_path)), shape, False, Ledger(1.0))
    out = decode(pending_rows("wide.png", "gone.png", "small.png"))
    assert out.schema == decoded_schema(shape)
    assert out["reason"].to_pylist() == [None, "missing", None]
    assert out["pixel_rows"].to_pylist() == [10, 0, 30] and out["width"].to_pylist() == [60, 0, 7]
    wide, gone, small = pixels_of(pa.concat_tables([out.slice(0, 1), out.slice(1)]))
    assert wide.shape == (10, 30, 3) and (wide == (200, 10, 10)).all()
    assert gone.size == 0
    assert small.shape == (30, 7, 3) and small.dtype == np.uint8
    assert (small == prepare_whole((tmp_path / "small.png").read_bytes(), 300).pixels).all()
