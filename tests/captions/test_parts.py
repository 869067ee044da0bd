"""Locations of captions' images, from one pass over the manifest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sharegpt4v.captions import parts
from tests.captions.fake_run import caption, reject, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty captions, ten rejects, in many small parts."""
    captions = [caption(f"{n:02}", "A cup.") for n in range(20)]
    return write_run(tmp_path / "run", captions, [reject(f"r{n}", "missing") for n in range(10)], part_rows=4)


@pytest.mark.parametrize("rows", [1, 3, 7, 30])
def test_the_manifest_is_read_once_however_many_batches_there_are(
    run: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    read: list[int] = []
    batches = parts.batches

    def spy(*arguments: Any) -> Iterator[pa.RecordBatch]:
        for batch in batches(*arguments):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(parts, "batches", spy)
    ids = [batch["id"] for batch in batches(run, "captions", ["id"], rows)]
    found = [place for places in parts.locations_in_order(run, ids) for place in places]
    known = parts.locations(run, [f"{n:02}" for n in range(20)])
    assert found == list(known.values()) and len(found) == 20
    assert sum(read) <= 30


def test_no_captions_have_no_locations(run: Path) -> None:
    assert list(parts.locations_in_order(run, [])) == []
    assert list(parts.locations_in_order(run, [pa.array([], pa.string())])) == [[]]


def test_an_id_that_the_manifest_does_not_hold_is_no_silent_gap(run: Path) -> None:
    with pytest.raises(AssertionError, match="an id that the manifest does not"):
        list(parts.locations_in_order(run, [pa.array(["nobody"])]))
