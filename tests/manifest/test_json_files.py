import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import read_rows
from tests.manifest.conftest import Record, caption_record, write_json, write_jsonl

WRITERS = [write_json, write_jsonl]


def rows_of(path: Path, text: str | bytes) -> list[Any]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_rows(str(path)))


@pytest.mark.parametrize("write", WRITERS)
def test_released_caption_file_is_a_manifest_as_it_is(tmp_path: Path, write: Any) -> None:
    records = [caption_record(1), caption_record(2, "sam/images/sa_2.jpg")]
    first, second = read_rows(write(tmp_path / "share-captioner.json", records))
    assert first == {
        "id": "000000000001",
        "image": "coco/train2017/000000000001.jpg",
        "source": "coco",
        "container": "",
        "offset": 0,
        "size": -1,
        "conversations": records[0]["conversations"],
    }
    assert second["source"] == "sam"


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("coco/train2017/1.jpg", "coco"),
        ("llava/llava_pretrain/images/00453/004539375.jpg", "lcs"),
        ("sam/images/sa_1.jpg", "sam"),
        ("share_textvqa/images/1.jpg", "textcaps"),
        ("textvqa/train_images/1.jpg", "textcaps"),
        ("web-landmark/images/1.jpg", "landmark"),
        ("web-celebrity/images/1.jpg", "celebrity"),
        ("wikiart/images/1.jpg", "wikiart"),
        ("gqa/images/1.jpg", "gqa"),
        ("ocr_vqa/images/1.jpg", "ocr_vqa"),
        ("vg/VG_100K_2/1.jpg", "vg"),
        ("cocoa/1.jpg", "cocoa"),
        ("00453/1.jpg", "unknown"),
        ("s3://bucket/cats/1.jpg", "unknown"),
        ("/data/cats/1.jpg", "unknown"),
        ("1.jpg", "unknown"),
    ],
)
def test_missing_source_comes_from_the_first_folder(tmp_path: Path, image: str, source: str) -> None:
    (row,) = read_rows(write_jsonl(tmp_path / "m.jsonl", [{"image": image}]))
    assert row["source"] == source


@pytest.mark.parametrize("write", WRITERS)
def test_missing_id_becomes_the_relative_path_and_given_fields_stay(tmp_path: Path, write: Any) -> None:
    records: list[Record] = [{"image": "coco/a b.jpg"}, {"image": "coco/1.jpg", "id": 7, "source": "mine"}]
    first, second = read_rows(write(tmp_path / "m.json", records))
    assert (first["id"], first["source"]) == ("coco/a b.jpg", "coco")
    assert (second["id"], second["source"]) == ("7", "mine")


@pytest.mark.parametrize("write", WRITERS)
def test_unknown_keys_are_ignored_and_odd_names_kept(tmp_path: Path, write: Any) -> None:
    name = 'ö/日本 "x"\n.jpg'
    (row,) = read_rows(write(tmp_path / "m.json", [{"image": name, "width": [1], "url": {"a": 1}}]))
    assert (row["id"], row["image"]) == (name, name)


@pytest.mark.parametrize("write", WRITERS)
def test_paths_that_leave_the_root_are_left_for_the_image_reader(tmp_path: Path, write: Any) -> None:
    rows = read_rows(write(tmp_path / "m.json", [{"image": "../a.jpg"}, {"image": "/etc/passwd"}]))
    assert [row["image"] for row in rows] == ["../a.jpg", "/etc/passwd"]


@pytest.mark.parametrize("text", ['[{"image": "a.jpg"}]', '{"image": "a.jpg"}\n'])
def test_byte_order_mark_is_passed_over(tmp_path: Path, text: str) -> None:
    assert rows_of(tmp_path / "m.json", b"\xef\xbb\xbf" + text.encode())[0]["image"] == "a.jpg"


def test_utf16_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="UTF-16.*save it as UTF-8"):
        rows_of(tmp_path / "m.json", '[{"image": "a.jpg"}]'.encode("utf-16"))


def test_half_written_last_line_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 3 is not valid JSON .*half-written: remove that line"):
        rows_of(tmp_path / "m.jsonl", '{"image": "a.jpg"}\n\n{"image": "b')


def test_bad_line_in_the_middle_is_not_called_half_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 is not valid JSON") as refused:
        rows_of(tmp_path / "m.jsonl", b'{"image": "\xff"}\n{"image": "b"}\n')
    assert "half-written" not in str(refused.value)


def test_cut_array_names_the_byte_where_it_ends(tmp_path: Path) -> None:
    text = json.dumps([caption_record(n) for n in range(5)])[:-30]
    with pytest.raises(UserError, match=f"ends at byte {len(text)} .* after 4 whole records"):
        rows_of(tmp_path / "m.json", text)


def test_broken_array_says_where(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not valid JSON \(Expecting value\) at byte 16, in record 2"):
        rows_of(tmp_path / "m.json", '[{"image": "a"},, {"image": "b"}]')


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"id": None, "image": "a"}, "id None"),
        ({"id": ["a"], "image": "a"}, r"id \['a'\]"),
        ({"id": True, "image": "a"}, "id True"),
        ({"id": 1.5, "image": "a"}, "id 1.5"),
        ({"id": "", "image": "a"}, "an empty id"),
        ({"id": "a\0", "image": "a"}, "a NUL character in its id"),
        ({"image": "a\0b"}, "a NUL character in its image"),
        ({"image": ["a", "b"]}, "image .*path as text"),
        ({"image": "a", "source": 3}, "source 3"),
        ({"image": "a", "offset": "3"}, "offset '3'"),
        ({"image": "a", "conversations": "hello"}, "conversations 'hello'"),
        ({"image": "a", "conversations": ["hello"]}, "conversations .*from"),
        ({"image": "a", "conversations": [{"from": "gpt", "value": 1}]}, "conversations .*from"),
        (["a"], "list, not an object"),
    ],
)
def test_wrong_type_is_refused_with_its_record(tmp_path: Path, write: Any, record: Any, problem: str) -> None:
    with pytest.raises(UserError, match=f"record 2 (has|is) {problem}"):
        list(read_rows(write(tmp_path / "m.json", [{"image": "ok.jpg"}, record])))


def test_lone_surrogate_in_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record 1 has image .*surrogates"):
        rows_of(tmp_path / "m.jsonl", '{"image": "\\ud800.jpg"}\n')


def test_lone_surrogate_in_a_conversation_becomes_the_replacement_character(tmp_path: Path) -> None:
    turns = '[{"from": "gpt", "value": "a \\ud800 b \\ud83d\\ude00"}]'
    (row,) = rows_of(tmp_path / "m.jsonl", f'{{"image": "a.jpg", "conversations": {turns}}}\n')
    assert row["conversations"][0]["value"] == "a \ufffd b \U0001f600"


def test_absurdly_nested_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        rows_of(tmp_path / "m.jsonl", '{"image": ' + "[" * 100_000)


def test_missing_image_column_lists_the_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column image: its records have id, file_name"):
        rows_of(tmp_path / "m.json", '[{"id": "a", "file_name": "a.jpg"}]')


def test_large_array_is_read_with_flat_memory(tmp_path: Path) -> None:
    # 40 MB of captions, read in a process of its own after a small file that pays for the imports.
    turns = [{"from": "gpt", "value": "A long caption of a wooden table. " * 50}]
    large, small = [
        write_json(
            tmp_path / f"{rows}.json", ({"image": f"{n}.jpg", "conversations": turns} for n in range(rows))
        )
        for rows in (23_000, 1)
    ]
    assert Path(large).stat().st_size > 40e6
    code = (
        "import sys, tracemalloc, pyarrow as pa\n"
        "from sharegpt4v.manifest.locate import locate\n"
        "from sharegpt4v.manifest.read import read_batches\n"
        "list(read_batches(locate(sys.argv[1], None)))\n"
        "tracemalloc.start()\n"
        "rows = sum(batch.num_rows for batch in read_batches(locate(sys.argv[2], None)))\n"
        "print(rows, tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory())\n"
    )
    command = [sys.executable, "-c", code, small, large]
    rows, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert rows == 23_000
    assert peak < 25e6, "a JSON array is being held in memory (18 MB measured)"
