"""What check concludes from the images it looked at, in manifest order."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v import inspection as module
from sharegpt4v.inspection import DIGEST_BYTES, INSPECTED, Inspection, InspectionSummary
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


def _settle(tmp_path: Path, *tables: pa.Table) -> tuple[InspectionSummary, pa.Table]:
    findings = Inspection(tmp_path)
    for table in tables:
        findings.add(table)
    found = findings.settle(tmp_path / "rejects.parquet")
    return found, pq.read_table(tmp_path / "rejects.parquet")


def test_reasons_come_to_kinds_by_source(tmp_path: Path) -> None:
    found, _ = _settle(
        tmp_path,
        _table([("a", "a", None), ("b", "", "missing"), ("c", "c", "truncated"), ("d", "d", "bomb")]),
        _table([("e", "a", None), ("f", "f", "bad_aspect"), ("g", "g", "killed_worker")], "sam"),
    )
    assert found.by_source == {
        "coco": {"images": 4, "ok": 1, "missing": 1, "broken": 1, "oversized": 1},
        "sam": {"images": 3, "duplicate": 1, "oversized": 1, "broken": 1},
    }
    assert found.by_reason == {
        "missing": 1,
        "truncated": 1,
        "bomb": 1,
        "duplicate": 1,
        "bad_aspect": 1,
        "killed_worker": 1,
    }


def test_the_first_of_equal_files_is_the_original_of_all_others(tmp_path: Path) -> None:
    _, rejects = _settle(
        tmp_path,
        _table([("z", "same", None), ("a", "same", None)]),
        _table([("other", "other", None), ("b", "same", None)]),
    )
    assert rejects.select(["id", "reason", "message"]).to_pylist() == [
        {"id": "a", "reason": "duplicate", "message": "the same bytes as 'z'"},
        {"id": "b", "reason": "duplicate", "message": "the same bytes as 'z'"},
    ]


def test_rejects_stand_in_manifest_order_with_their_own_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_ROWS", 2)
    rows: list[Row] = [(f"{9 - i}", f"{i % 5}", "truncated" if i in (1, 7) else None) for i in range(10)]
    found, rejects = _settle(tmp_path, _table(rows[:7]), _table(rows[7:]))
    assert rejects.schema == REJECTS
    # The second row is broken, so its bytes' next bearer, the seventh, is an original.
    assert [(row["id"], row["reason"]) for row in rejects.to_pylist()] == [
        ("8", "truncated"),
        ("4", "duplicate"),
        ("2", "truncated"),
        ("1", "duplicate"),
        ("0", "duplicate"),
    ]
    assert [row["message"] for row in rejects.to_pylist() if row["reason"] == "duplicate"] == [
        "the same bytes as '9'",
        "the same bytes as '6'",
        "the same bytes as '5'",
    ]
    assert found.examples == rejects.to_pylist()


def test_a_broken_file_is_neither_a_duplicate_nor_an_original(tmp_path: Path) -> None:
    found, _ = _settle(tmp_path, _table([("a", "x", "truncated"), ("b", "x", "truncated"), ("c", "x", None)]))
    assert found.by_reason == {"truncated": 2}
    assert found.by_source["coco"]["ok"] == 1


def test_digests_that_share_their_first_half_are_different_files(tmp_path: Path) -> None:
    table = _table([("a", "x", None), ("b", "x", None), ("c", "y", None)])
    digests = [bytes(8) + b"abcdefgh", bytes(8) + b"abcdefgi", b"abcdefgh" + bytes(8)]
    table = table.set_column(3, INSPECTED.field("digest"), pa.array(digests, pa.binary(DIGEST_BYTES)))
    found, _ = _settle(tmp_path, table)
    assert found.findings == 0


def test_only_the_first_examples_are_kept(tmp_path: Path) -> None:
    found, rejects = _settle(tmp_path, *[_table([(f"{i:02}", "", "missing")]) for i in range(20)])
    assert [row["id"] for row in found.examples] == ["00", "01", "02", "03", "04"]
    assert (found.findings, len(rejects)) == (20, 20)


def test_nothing_wrong_still_writes_the_file(tmp_path: Path) -> None:
    found, rejects = _settle(tmp_path, _table([("a", "a", None)]))
    assert (found.findings, len(rejects), rejects.schema) == (0, 0, REJECTS)


def test_an_interrupted_end_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    findings = Inspection(tmp_path)
    findings.add(_table([("a", "a", "missing")]))
    out = tmp_path / "rejects"
    out.mkdir()
    monkeypatch.setattr(module, "_count", interrupted)
    with pytest.raises(KeyboardInterrupt):
        findings.settle(out / "part-00000.parquet")
    assert list(out.iterdir()) == []
