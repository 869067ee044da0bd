"""What check concludes from the images it looked at, in manifest order."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v import inspection as module
from sharegpt4v.inspection import DIGEST_BYTES, DUPLICATES, INSPECTED, Inspection, InspectionSummary
from sharegpt4v.records import REJECTS

Row = tuple[str, str, str | None]  # id, content of the file, reason


def _table(rows: list[Row], source: str = "coco") -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "id": name,
                "image": f"{name}.jpg",
                "source": source,
                "digest": hashlib.sha256(content.encode()).digest()[:DIGEST_BYTES],
                "reason": reason,
                "message": reason and f"{name} is {reason}",
            }
            for name, content, reason in rows
        ],
        INSPECTED,
    )


def _settle(tmp_path: Path, *tables: pa.Table) -> tuple[InspectionSummary, pa.Table, pa.Table]:
    """Summary, rejects and duplicates."""
    inspection = Inspection(tmp_path)
    for table in tables:
        inspection.add(table)
    paths = tmp_path / "rejects.parquet", tmp_path / "duplicates.parquet"
    found = inspection.settle(*paths)
    return found, *(pq.read_table(path) for path in paths)


def test_reasons_come_to_kinds_by_source(tmp_path: Path) -> None:
    found, _, _ = _settle(
        tmp_path,
        _table([("a", "a", None), ("b", "", "missing"), ("c", "c", "truncated"), ("d", "d", "bomb")]),
        _table([("e", "a", None), ("f", "f", "bad_aspect"), ("g", "g", "killed_worker")], "sam"),
    )
    assert found.by_source == {
        "coco": {"images": 4, "usable": 1, "missing": 1, "broken": 1, "oversized": 1},
        "sam": {"images": 3, "usable": 1, "duplicate": 1, "oversized": 1, "broken": 1},
    }
    assert found.by_reason == {
        "missing": 1,
        "truncated": 1,
        "bomb": 1,
        "bad_aspect": 1,
        "killed_worker": 1,
    }


def test_the_first_of_equal_files_is_the_original_of_all_others(tmp_path: Path) -> None:
    found, rejects, duplicates = _settle(
        tmp_path,
        _table([("z", "same", None), ("a", "same", None)]),
        _table([("other", "other", None), ("b", "same", None)]),
    )
    assert duplicates.select(["id", "original"]).to_pylist() == [
        {"id": "a", "original": "z"},
        {"id": "b", "original": "z"},
    ]
    assert (len(rejects), found.count("usable"), found.count("duplicate")) == (0, 4, 2)


def test_both_files_are_in_manifest_order_with_their_own_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_ROWS", 2)
    rows: list[Row] = [(f"{9 - i}", f"{i % 5}", "truncated" if i in (1, 7) else None) for i in range(10)]
    _, rejects, duplicates = _settle(tmp_path, _table(rows[:7]), _table(rows[7:]))
    assert (rejects.schema, duplicates.schema) == (REJECTS, DUPLICATES)
    assert rejects["id"].to_pylist() == ["8", "2"] and rejects["caption"].null_count == 2
    # The second row is broken, so the next image with its bytes, the seventh, is an original.
    names = zip(duplicates["id"].to_pylist(), duplicates["original"].to_pylist(), strict=True)
    assert list(names) == [("4", "9"), ("1", "6"), ("0", "5")]


def test_a_broken_file_is_neither_a_duplicate_nor_an_original(tmp_path: Path) -> None:
    found, _, duplicates = _settle(
        tmp_path, _table([("a", "x", "truncated"), ("b", "x", "truncated"), ("c", "x", None)])
    )
    assert found.by_reason == {"truncated": 2}
    assert (found.by_source["coco"]["usable"], len(duplicates)) == (1, 0)


def test_digests_that_share_their_first_half_are_different_files(tmp_path: Path) -> None:
    table = _table([("a", "x", None), ("b", "x", None), ("c", "y", None)])
    digests = [bytes(8) + b"abcdefgh", bytes(8) + b"abcdefgi", b"abcdefgh" + bytes(8)]
    table = table.set_column(3, INSPECTED.field("digest"), pa.array(digests, pa.binary(DIGEST_BYTES)))
    found, _, _ = _settle(tmp_path, table)
    assert found.count("duplicate") == 0


def test_each_reason_has_its_first_image_as_example(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{i:02}", "", "missing") for i in range(20)]
    found, rejects, _ = _settle(tmp_path, _table(rows), _table([("x", "", "bomb"), ("y", "", "missing")]))
    assert {reason: row["id"] for reason, row in found.examples.items()} == {"missing": "00", "bomb": "x"}
    assert len(rejects) == 22


def test_nothing_wrong_still_writes_the_files(tmp_path: Path) -> None:
    found, rejects, duplicates = _settle(tmp_path, _table([("a", "a", None)]))
    assert (found.by_reason, len(rejects), rejects.schema) == ({}, 0, REJECTS)
    assert duplicates.schema == DUPLICATES


def test_an_interrupted_end_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    inspection = Inspection(tmp_path)
    inspection.add(_table([("a", "a", "missing")]))
    out = tmp_path / "rejects"
    out.mkdir()
    monkeypatch.setattr(module, "_count", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspection.settle(out / "part-00000.parquet", out / "duplicates.parquet")
    assert list(out.iterdir()) == []
