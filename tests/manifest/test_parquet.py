from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import ManifestRow, normalise, parquet, read_rows
from tests.manifest.conftest import caption_record, write_json


def rows_of(tmp_path: Path, columns: dict[str, Any]) -> list[ManifestRow]:
    pq.write_table(pa.table(columns), tmp_path / "m.parquet", row_group_size=2)
    return list(read_rows(str(tmp_path / "m.parquet")))


def test_image_alone_is_enough_and_unknown_columns_are_ignored(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"image": ["sam/a.jpg", "b.jpg", "c.jpg"], "blob": [b"1", b"2", b"3"]})
    assert [(row["id"], row["source"]) for row in rows] == [
        ("sam/a.jpg", "sam"),
        ("b.jpg", "unknown"),
        ("c.jpg", "unknown"),
    ]


def test_column_types_that_other_writers_use_are_taken(tmp_path: Path) -> None:
    turn = pa.struct([("value", pa.large_string()), ("from", pa.string()), ("lang", pa.string())])
    (row,) = rows_of(
        tmp_path,
        {
            "id": pa.array([12], pa.int64()),
            "image": pa.array(["a.jpg"], pa.large_string()),
            "source": pa.array(["mine"]).dictionary_encode(),
            "conversations": pa.array([[{"value": "hi", "from": "gpt", "lang": "en"}]], pa.large_list(turn)),
        },
    )
    assert (row["id"], row["source"]) == ("12", "mine")
    assert row["conversations"] == [{"from": "gpt", "value": "hi"}]


def test_null_id_is_refused_with_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)  # the count goes on from batch to batch
    with pytest.raises(UserError, match="record 3 has id None"):
        rows_of(tmp_path, {"id": ["a", "b", None], "image": ["a", "b", "c"]})


def test_missing_image_column_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column image: it has id, images; rename images\?"):
        rows_of(tmp_path, {"id": ["a"], "images": ["b"]})


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("image", [{"bytes": b"x", "path": "a"}]),
        ("image", [["a"]]),
        ("id", [1.5]),
        ("id", [["a"]]),
        ("source", [1]),
        ("offset", ["1"]),
        ("conversations", ["text"]),
        ("conversations", [[{"role": "user", "content": "x"}]]),
    ],
)
def test_column_of_the_wrong_type_is_refused(tmp_path: Path, column: str, values: list[Any]) -> None:
    with pytest.raises(UserError, match=f"column {column} is .*; it needs"):
        rows_of(tmp_path, {"image": ["a.jpg"], column: values})


def test_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        list(read_rows(str(path)))


def test_normalised_folder_is_a_manifest_again(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "m.json", [caption_record(n) for n in range(5)])
    normalise(path, None, out, shard_rows=2)
    assert list(read_rows(str(out))) == list(read_rows(path))
