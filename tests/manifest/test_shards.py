import gzip
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import normalise, read_rows
from tests.manifest.conftest import write_tar


def bytes_at(root: Path, container: str, offset: int, size: int) -> bytes:
    with (root / container).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def test_rows_say_where_in_the_shard_the_bytes_lie(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"coco/1.jpg": b"first", "coco/1.txt": b"cup", "coco/2.png": b"second!"})
    rows = list(read_rows(str(tmp_path / "s-0.tar")))
    assert [row["id"] for row in rows] == ["s-0.tar/coco/1.jpg", "s-0.tar/coco/2.png"]
    assert [row["source"] for row in rows] == ["coco", "coco"]
    found = [bytes_at(tmp_path, row["container"], row["offset"], row["size"]) for row in rows]
    assert found == [b"first", b"second!"]


def test_long_names_do_not_shift_the_offsets(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"ü" * 150 + ".jpg": b"one", "x" * 300 + ".jpg": b"two"})
    rows = list(read_rows(str(tmp_path / "s.tar")))
    found = [bytes_at(tmp_path, row["container"], row["offset"], row["size"]) for row in rows]
    assert found == [b"one", b"two"]


@pytest.mark.parametrize("json_first", [True, False])
def test_sidecar_of_the_same_key_gives_id_source_and_conversations(tmp_path: Path, json_first: bool) -> None:
    turns = [{"from": "gpt", "value": "A cup."}]
    record = {"id": 17, "source": "mine", "conversations": turns, "image": "elsewhere.jpg", "width": 3}
    members = {"000.json": json.dumps(record).encode(), "000.jpg": b"x"}
    if not json_first:
        members = dict(reversed(members.items()))
    write_tar(tmp_path / "s.tar", {**members, "001.jpg": b"y", "002.json": b"{}"})
    first, second = read_rows(str(tmp_path / "s.tar"))
    assert (first["id"], first["source"], first["conversations"]) == ("17", "mine", turns)
    assert (first["image"], second["id"]) == ("000.jpg", "s.tar/001.jpg")


def test_shards_written_by_webdataset_are_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "a/0001", "jpg": b"bytes", "json": {"id": "one"}})
    (row,) = read_rows(str(tmp_path / "w.tar"))
    assert (row["id"], row["image"]) == ("one", "a/0001.jpg")


def test_folder_and_glob_of_shards_read_alike(tmp_path: Path, out: Path) -> None:
    for number in (1, 0):
        write_tar(tmp_path / "set" / f"{number}.tar", {"0.jpg": b"x"})
        (tmp_path / "set" / f"{number}.parquet").touch()  # the notes of img2dataset
    folder = list(read_rows(str(tmp_path / "set")))
    assert [row["id"] for row in folder] == ["0.tar/0.jpg", "1.tar/0.jpg"]
    assert list(read_rows(str(tmp_path / "set" / "*.tar"))) == folder
    assert normalise(str(tmp_path / "set"), None, out).root == str(tmp_path / "set")


def test_given_root_moves_the_containers_below_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set" / "0.tar", {"0.jpg": b"x"})
    (row,) = read_rows(path, str(tmp_path))
    assert row["container"] == "set/0.tar"
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="outside the image root"):
        list(read_rows(path, str(tmp_path / "other")))


def test_hidden_members_and_links_are_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"./._a.jpg": b"x", ".git/b.jpg": b"x", "./a.jpg": b"x"})
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [row["image"] for row in read_rows(str(tmp_path / "s.tar"))] == ["./a.jpg"]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_compressed_shard_is_refused_with_the_fix(tmp_path: Path, name: str) -> None:
    plain = Path(write_tar(tmp_path / "plain", {"a.jpg": b"x"}))
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UserError, match=f"{name} is compressed.*: gunzip it first"):
        list(read_rows(str(tmp_path / name)))


def test_shard_cut_inside_an_image_is_refused(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.jpg": b"x", "b.jpg": b"y" * 2000}))
    path.write_bytes(path.read_bytes()[:2100])
    with pytest.raises(UserError, match="not a whole tar file .*unexpected end of data"):
        list(read_rows(str(path)))


def test_damaged_header_does_not_end_the_shard_in_silence(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.jpg": b"x", "b.jpg": b"y", "c.jpg": b"z"}))
    content = bytearray(path.read_bytes())
    content[1024:1034] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged at byte 1024: copy"):
        list(read_rows(str(path)))


def test_two_images_under_one_key_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"a.left.jpg": b"x", "a.right.jpg": b"y"})
    with pytest.raises(UserError, match="key a has 2 images"):
        list(read_rows(str(tmp_path / "s.tar")))


@pytest.mark.parametrize("content", [b"{", b"[1]"])
def test_sidecar_that_is_no_record_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "s.tar", {"a.json": content, "a.jpg": b"x"})
    with pytest.raises(UserError, match="a.json is"):
        list(read_rows(str(tmp_path / "s.tar")))


def test_headers_of_a_large_shard_are_not_kept(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {f"{n}.txt": b"" for n in range(4000)} | {"a.jpg": b"x"})
    list(read_rows(path))  # pays for the imports
    tracemalloc.start()
    assert len(list(read_rows(path))) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6, "tarfile keeps a header for every member"
