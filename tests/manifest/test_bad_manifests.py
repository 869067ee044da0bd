"""Manifests that no reader expects: each ends in one line with the place, none hangs or fills the memory."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import normalise, read_rows
from tests.commands import environment
from tests.images.mutations import BYTES
from tests.manifest.conftest import caption_record, write_json, write_jsonl, write_tar

IMAGES = pa.array(["a.jpg", "b.jpg", "c.jpg"])


def _refused(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path)))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


def _parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def _not_utf8() -> pa.Array:
    """Three texts of three bytes, of which the second is no UTF-8."""
    offsets = pa.array([0, 3, 6, 9], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a.j\xff\xfe\xfdc.j"))


@pytest.mark.parametrize("column", ["id", "image", "source", "container"])
def test_text_in_parquet_that_is_not_utf8_names_its_record(tmp_path: Path, column: str) -> None:
    columns = {"image": IMAGES, column: _not_utf8()}
    line = _refused(_parquet(tmp_path / "m.parquet", **columns))
    assert line.endswith(f"m.parquet: record 2 has text that is not UTF-8 in column {column}")


def test_a_turn_in_parquet_that_is_not_utf8_names_its_record(tmp_path: Path) -> None:
    turns = pa.StructArray.from_arrays([pa.array(["gpt"] * 3), _not_utf8()], ["from", "value"])
    conversations = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turns)
    line = _refused(_parquet(tmp_path / "m.parquet", image=IMAGES, conversations=conversations))
    assert "record 2 has text that is not UTF-8 in column conversations" in line


@pytest.mark.parametrize("column", ["image", "id"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, column: str) -> None:
    table = pa.table([IMAGES] * 3, names=["image", column, column if column == "id" else "other"])
    pq.write_table(table, tmp_path / "m.parquet")
    assert f"m.parquet has 2 columns {column}: keep one" in _refused(tmp_path / "m.parquet")


@pytest.mark.parametrize("value", [["a list"], 3])
def test_turns_in_parquet_that_are_no_text_are_refused(tmp_path: Path, value: Any) -> None:
    path = _parquet(
        tmp_path / "m.parquet", image=IMAGES, conversations=[[{"from": "gpt", "value": value}]] * 3
    )
    assert "column conversations is list" in _refused(path)


def test_an_offset_out_of_range_names_its_record(tmp_path: Path) -> None:
    offsets = pa.array([1, 2**64 - 1, 3], pa.uint64())
    line = _refused(_parquet(tmp_path / "m.parquet", image=IMAGES, offset=offsets))
    assert "record 2 has a value out of range" in line and line.endswith("in column offset")


WRITE: dict[str, Callable[[str], str]] = {"json": "[{}]".format, "jsonl": "{}\n".format}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("column", ["id", "image", "source"])
def test_lone_surrogates_are_refused(tmp_path: Path, kind: str, column: str) -> None:
    record = {"id": "1", "image": "a.jpg", column: "\ud800"}
    (tmp_path / f"m.{kind}").write_text(WRITE[kind](json.dumps(record)))
    assert f"record 1 has {column} '\\ud800'; it needs text without lone surrogates" in _refused(
        tmp_path / f"m.{kind}"
    )


@pytest.mark.parametrize("kind", WRITE)
def test_lists_as_turns_are_refused(tmp_path: Path, kind: str) -> None:
    record = {"image": "a.jpg", "conversations": [{"from": "gpt", "value": ["a"]}]}
    (tmp_path / f"m.{kind}").write_text(WRITE[kind](json.dumps(record)))
    assert "record 1 has conversations" in _refused(tmp_path / f"m.{kind}")


NESTED = {
    "image": "[" * 100_000 + "]" * 100_000,
    "conversations": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "unknown": "[" * 100_000,
}


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("column", NESTED)
def test_deep_nesting_ends_soon_and_in_little_memory(tmp_path: Path, kind: str, column: str) -> None:
    (tmp_path / f"m.{kind}").write_text(WRITE[kind](f'{{"id": "1", "{column}": {NESTED[column]}}}'))
    code = (
        "import resource, sys\n"
        "from sharegpt4v.errors import UserError\n"
        "from sharegpt4v.manifest import read_rows\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try: list(read_rows(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / f"m.{kind}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment())
    place = "at byte 1, in record 1" if kind == "json" else "line 1"
    assert "nested too deep" in done.stdout and place in done.stdout, done.stderr[-500:]


def test_a_value_of_the_wrong_type_that_is_nested_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": ' + "[" * 900 + "]" * 900 + "}\n")
    assert "record 1 has image [[[" in _refused(tmp_path / "m.jsonl")


@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "m.parquet", "m.tar"])
@pytest.mark.timeout(20)
def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert f"{name} is a pipe" in _refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert f"{name} is a pipe" in _refused(tmp_path / name)


def test_a_pipe_among_archives_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x"})
    os.mkfifo(tmp_path / "1.tar")
    assert f"{tmp_path / '1.tar'} is a pipe" in _refused(tmp_path)


def test_a_folder_deeper_than_a_path_may_be_long(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=folder)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    line = _refused(tmp_path)
    assert f"{tmp_path} holds a folder whose path has 4," in line and "more than this system opens" in line


def test_a_link_to_nothing_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to("gone.jsonl")
    assert "m.jsonl is a link to nothing" in _refused(tmp_path / "m.jsonl")


def test_a_compressed_list_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0")
    assert "m.json is compressed: gunzip it first" in _refused(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b'[{"image": "\xff"}]', "is not UTF-8 (invalid start byte) at byte 12, in or after record 1"),
        (b'[{"image": "a"}] more', "(something follows the array) at byte 17, in record 2"),
        (b'[{"image": "a"} {"image": "b"}]', "(expected ',') at byte 16, in record 2"),
        ('[{"image": "ü"}, {"image": b"}]'.encode(), "(Expecting value) at byte 28, in record 2"),
        (b'[{"image": "a", "id": ' + b"9" * 5000 + b"}]", "at byte 1, in record 1"),
        (
            b'[{"image": "a"}, {"image": "b}]' + b" " * 1000,
            "ends at byte 1031 inside the array, after 1 whole",
        ),
    ],
)
def test_mistakes_in_an_array_have_a_place(tmp_path: Path, text: bytes, place: str) -> None:
    (tmp_path / "m.json").write_bytes(text)
    assert place in _refused(tmp_path / "m.json")


def test_records_larger_than_what_is_read_at_a_time_are_whole(tmp_path: Path) -> None:
    words = ["ü" * 999_999, "", '"' * 300_000, "€" * 262_143]
    records = [{"image": f"{n}.jpg", "source": text, "id": n} for n, text in enumerate(words)]
    found = [(row["id"], row["source"]) for row in read_rows(write_json(tmp_path / "m.json", records))]
    assert found == [(f"{n}", text) for n, text in enumerate(words)]


@pytest.mark.parametrize("length", range(1, 40))
def test_an_array_may_be_cut_anywhere(tmp_path: Path, length: int) -> None:
    text = b'[{"image": "a", "offset": -12}, {"image": "\xc3\xbc"}]'
    (tmp_path / "m.json").write_bytes(text[:length])
    found = re.search(r"at byte (\d+)", _refused(tmp_path / "m.json"))
    assert found and length - 1 <= int(found[1]) <= length


def test_damage_anywhere_ends_in_one_line_or_in_rows(tmp_path: Path) -> None:
    records = [caption_record(number) for number in range(40)]
    write_json(tmp_path / "m.json", records)
    write_jsonl(tmp_path / "m.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "m.parquet", row_group_size=10)
    members = {f"{record['id']}.json": json.dumps(record).encode() for record in records}
    write_tar(tmp_path / "m.tar", {**members, **{name[:-4] + "jpg": b"x" for name in members}})
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    chance, refused = random.Random(0), 0
    mutations = [mutate for mutate in BYTES if mutate.__name__ != "_splice"]
    for seed in range(400):
        path = chance.choice(list(files))
        path.write_bytes(chance.choice(mutations)(files[path], chance))
        try:
            normalise(str(path), None, tmp_path / "out" / f"{seed}")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 200 < refused < 400
