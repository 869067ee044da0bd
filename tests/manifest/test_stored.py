"""A manifest is read again when its input, its arguments or its shards changed, and only then."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sharegpt4v.manifest import Manifest, normalise, stored
from tests.commands import write_images
from tests.manifest.conftest import write_jsonl, write_tar

Reads = Callable[..., tuple[Manifest, bool]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Normalises an input into one folder; returns the manifest, and whether its input was read."""
    monkeypatch.setattr(stored, "SETTLED_SECONDS", -60.0)  # the files were written a moment ago
    record = tmp_path / "work" / "input.json"

    def normalised(path: Path | str, **options: Any) -> tuple[Manifest, bool]:
        read: list[int] = []
        options |= {"record": record, "progress": read.append}
        return normalise(str(path), options.pop("root", None), tmp_path / "manifest", **options), bool(read)

    return normalised


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", ["coco/a.jpg", "coco/b.jpg", "sam/c.jpg"])
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


def test_an_unchanged_input_is_not_read_and_gives_the_same_manifest(images: Path, read: Reads) -> None:
    first, was_read = read(images)
    assert was_read and (first.rows, first.added) == (3, 3)
    again, was_read = read(images)
    assert not was_read and again.added == 0
    for name in ("rows", "sources", "root", "ignored", "same_image_ids", "folder"):
        assert getattr(again, name) == getattr(first, name)


def test_an_image_that_comes_or_goes_anywhere_is_seen(images: Path, read: Reads) -> None:
    read(images)
    (images / "sam" / "c.jpg").write_bytes(b"another content")  # a folder's manifest knows its names alone
    assert not read(images)[1]
    write_images(images, ["sam/d.jpg"])
    manifest, was_read = read(images)
    assert was_read and manifest.rows == 4
    write_images(images, ["sam/deep/e.jpg"])
    assert read(images)[0].rows == 5 and not read(images)[1]
    (images / "coco" / "a.jpg").unlink()
    assert read(images)[1]


@pytest.mark.parametrize("option", ["limit", "sample", "source", "dedupe_image"])
def test_another_argument_reads_again(images: Path, read: Reads, option: str) -> None:
    options = {option: {"limit": 2, "sample": 2, "source": "mine", "dedupe_image": True}[option]}
    read(images, **options)
    assert not read(images, **options)[1]
    if option != "source":  # which would change known rows
        assert read(images)[1]


def test_a_changed_or_added_file_is_seen(tmp_path: Path, read: Reads) -> None:
    for number in range(2):
        write_tar(tmp_path / "tars" / f"{number}.tar", {f"{number}.jpg": b"x"})
    read(tmp_path / "tars")
    assert not read(tmp_path / "tars")[1]
    write_tar(tmp_path / "tars" / "2.tar", {"2.jpg": b"x"})
    assert read(tmp_path / "tars")[0].rows == 3
    write_tar(tmp_path / "tars" / "0.tar", {"0.jpg": b"x", "9.jpg": b"x"})
    assert read(tmp_path / "tars")[0].rows == 4


def test_a_file_of_the_same_size_and_time_is_not_taken_for_the_old_one(tmp_path: Path, read: Reads) -> None:
    path = tmp_path / "list.jsonl"
    write_jsonl(path, [{"id": "1", "image": "a.jpg"}])
    before = path.stat()
    read(path)
    write_jsonl(path, [{"id": "2", "image": "b.jpg"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(path)[0].rows == 2


def test_a_change_within_a_tick_of_the_clock_is_not_missed(
    images: Path, read: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was changed just now may be changed again without another time: such an input is read again."""
    monkeypatch.setattr(stored, "SETTLED_SECONDS", 2.0)
    read(images)
    assert read(images)[1]


def test_shards_that_are_not_those_of_the_record_are_made_again(
    images: Path, read: Reads, tmp_path: Path
) -> None:
    read(images)
    (tmp_path / "manifest" / "part-00000.parquet").unlink()
    manifest, was_read = read(images)
    assert was_read and manifest.rows == 3
    (tmp_path / "work" / "input.json").write_text("{half")
    assert read(images)[1] and not read(images)[1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A plain web server, which tells size and time of change. Its folder is tmp_path/served."""
    (tmp_path / "served").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


def test_a_file_behind_a_uri_is_known_by_size_and_time_or_etag(
    server: str, tmp_path: Path, read: Reads
) -> None:
    served, uri = tmp_path / "served" / "list.jsonl", f"http://{server}/list.jsonl"
    write_jsonl(served, [{"id": "1", "image": "a.jpg"}])
    read(uri)
    assert not read(uri)[1]
    write_jsonl(served, [{"id": "1", "image": "a.jpg"}, {"id": "2", "image": "b.jpg"}])
    assert read(uri)[0].rows == 2
    os.utime(served, (time.time(), time.time() + 60))
    assert read(uri)[1]


def test_what_cannot_be_looked_at_again_is_read_again(server: str, tmp_path: Path, read: Reads) -> None:
    fsspec.filesystem("memory").pipe_file("/photos/a.jpg", b"image")
    read("memory://photos")
    assert read("memory://photos")[1]  # a folder of objects has no time that changes with its entries
    write_jsonl(tmp_path / "served" / "list.jsonl", [{"id": "1", "image": "a.jpg"}])
    secret = f"http://user:hush@{server}/list.jsonl"
    read(secret)
    assert not (tmp_path / "work" / "input.json").exists()
