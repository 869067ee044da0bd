import os
from pathlib import Path

import fsspec
import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import image_folder, normalise, read_rows


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")


def test_lists_images_recursively_in_the_order_of_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "CHUNK", 2)  # several chunks, sorted across them
    names = ["coco/b.jpg", "a.PNG", "coco/train2017/a.webp", "z.jpeg", "coco/a.gif", 'ü "x"\n.bmp']
    for name in names:
        touch(tmp_path / name)
    rows = list(read_rows(str(tmp_path)))
    assert [row["image"] for row in rows] == sorted(names)
    assert [row["id"] for row in rows] == sorted(names)
    assert {row["source"] for row in rows} == {"coco", "unknown"}


def test_hidden_files_are_skipped_and_others_counted_by_suffix(tmp_path: Path, out: Path) -> None:
    images = tmp_path / "images"
    for name in ["a.jpg", ".b.jpg", ".cache/c.jpg", "notes.txt", "x/read.TXT", "LICENSE", "d.tar"]:
        touch(images / name)
    manifest = normalise(str(images), None, out)
    assert manifest.rows == 1
    assert manifest.ignored == {".txt": 2, "no suffix": 1, ".tar": 1}
    assert manifest.root == str(images)


def test_linked_folders_are_not_followed(tmp_path: Path, out: Path) -> None:
    images = tmp_path / "images"
    touch(images / "a.jpg")
    (images / "loop").symlink_to(images)
    manifest = normalise(str(images), None, out)
    assert (manifest.rows, manifest.ignored) == (1, {"linked folder": 1})


def test_names_that_are_not_utf8_are_counted(tmp_path: Path, out: Path) -> None:
    images = tmp_path / "images"
    touch(images / "a.jpg")
    Path(os.fsdecode(os.fsencode(images) + b"/\xff.jpg")).write_bytes(b"")
    manifest = normalise(str(images), None, out)
    assert (manifest.rows, manifest.ignored) == (1, {"name not UTF-8": 1})


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    for name in ["sub/a.json", "sub/b.tar"]:
        touch(tmp_path / name)
    with pytest.raises(UserError, match=r"holds no image \(found: 1 .json, 1 .tar\)"):
        list(read_rows(str(tmp_path)))


def test_remote_folder_reads_as_a_local_one(out: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ["coco/2.jpg", "coco/1.jpg", ".hidden/3.jpg", "notes.txt"]:
        memory.pipe_file(f"/remote-folder/{name}", b"image")
    manifest = normalise("memory://remote-folder", None, out)
    assert [batch.to_pylist() for batch in manifest.ids()] == [["coco/1.jpg", "coco/2.jpg"]]
    assert manifest.ignored == {".txt": 1}
    with fsspec.open(f"{manifest.root}/coco/1.jpg") as file:
        assert file.read() == b"image"


def test_file_uri_is_the_local_folder(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    assert [row["image"] for row in read_rows(f"file://{tmp_path}")] == ["a.jpg"]


def test_folder_that_may_not_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "closed" / "b.jpg")
    scan = os.scandir

    def scandir(path: str) -> object:  # permissions do not stop root, who runs tests in containers
        if "closed" in path:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="closed/ may not be read"):
        list(read_rows(str(tmp_path)))


def test_links_that_lead_nowhere_are_counted_and_end_nothing(tmp_path: Path, out: Path) -> None:
    images = tmp_path / "images"
    touch(images / "a.jpg")
    (images / "loop").symlink_to("loop")
    (images / "far").symlink_to("x" * 300)  # longer than a name may be
    (images / "gone.txt").symlink_to("nowhere")
    manifest = normalise(str(images), None, out)
    assert manifest.rows == 1
    assert manifest.ignored == {"link that leads nowhere": 2, ".txt": 1}
