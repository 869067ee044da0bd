"""Archives that are not one plain tar file: every member is a row, refused, or counted by reason."""

import bz2
import io
import json
import lzma
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageReader
from sharegpt4v.manifest import Manifest, normalise, read_rows
from tests.manifest.conftest import write_tar


def _add(path: Path, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "") -> None:
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, len(content), link
        tar.addfile(info, io.BytesIO(content))


def _images(path: Path, numbers: range, size: int = 700) -> bytes:
    """The bytes of an archive of images, each of `size` bytes that are not zero."""
    write_tar(path, {f"{n:02}.jpg": bytes([n + 1]) * size for n in numbers})
    return path.read_bytes()


def _refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path)))
    return str(caught.value)


def _taken_in(path: Path, tmp_path: Path) -> Manifest:
    return normalise(str(path), None, tmp_path / "run" / "manifest")


def _headers(content: bytes) -> list[int]:
    """Where the members of an archive begin."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("padding", [0, 5 * 512, 3 << 20], ids=["none", "blocks", "megabytes"])
def test_archives_joined_in_one_file_are_all_read(tmp_path: Path, padding: int) -> None:
    joined = b"".join(
        _images(tmp_path / "part.tar", numbers) + bytes(padding) for numbers in (range(12), range(12, 13))
    )
    path = tmp_path / "s.tar"
    path.write_bytes(joined)
    reader = ImageReader(str(tmp_path))
    found = [
        reader.read(str(row["image"]), row["container"], row["offset"], row["size"])
        for row in read_rows(str(path))
    ]
    assert found == [bytes([n + 1]) * 700 for n in range(13)]


def test_a_key_ends_with_its_archive(tmp_path: Path) -> None:
    one = Path(write_tar(tmp_path / "a.tar", {"0.jpg": b"x"})).read_bytes()
    two = Path(write_tar(tmp_path / "b.tar", {"0.png": b"y", "0.json": b'{"id": "two"}'})).read_bytes()
    (tmp_path / "s.tar").write_bytes(one + two)
    assert [row["id"] for row in read_rows(str(tmp_path / "s.tar"))] == ["s.tar/0.jpg", "two"]


def test_a_zeroed_header_does_not_end_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    content = bytearray(_images(path, range(12)))
    at = _headers(bytes(content))[6]
    content[at : at + 512] = bytes(512)
    path.write_bytes(content)
    assert f"s.tar is damaged at byte {at}" in _refused(path)


def test_a_zeroed_header_before_a_whole_one_is_noticed(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.jpg": b"x", "b.txt": b"", "c.jpg": b"z"}))
    content = bytearray(path.read_bytes())
    content[1024:1536] = bytes(512)
    path.write_bytes(content)
    assert "damaged at byte 1024" in _refused(path)


def test_what_follows_the_end_must_be_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    content = _images(path, range(2))
    path.write_bytes(content + b"signature")
    assert f"damaged at byte {len(content)}: neither zeros nor another archive" in _refused(path)


@pytest.mark.parametrize("cut", [0, 100, 511], ids=["border", "name", "last byte"])
def test_a_file_cut_between_members_or_inside_a_header_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "s.tar"
    content = _images(path, range(12))
    at = _headers(content)[6]
    path.write_bytes(content[: at + cut])
    line = _refused(path)
    assert (f"is cut: it ends at byte {at}" if cut == 0 else f"is cut inside a header at byte {at}") in line


def test_an_archive_with_one_zero_block_at_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    content = _images(path, range(2))
    path.write_bytes(content[: 2 * 512 + 2 * 1024 + 512])
    assert len(list(read_rows(str(path)))) == 2


def test_every_member_that_is_no_image_is_counted(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"./a.jpg": b"x", "./._a.jpg": b"", "c/.git/b.jpg": b""}))
    _add(path, "folder", tarfile.DIRTYPE)
    _add(path, "hard.jpg", tarfile.LNKTYPE, link="./a.jpg")
    _add(path, "soft.jpg", tarfile.SYMTYPE, link="/etc/passwd")
    _add(path, "pipe.jpg", tarfile.FIFOTYPE)
    _add(path, "disk.jpg", tarfile.BLKTYPE)
    _add(path, "volume.jpg", b"V")
    _add(path, "not utf-8 \udcff.jpg")
    _add(path, "notes.txt")
    _add(path, "README")
    manifest = _taken_in(path, tmp_path)
    assert manifest.rows == 1
    assert manifest.ignored == {
        "hidden files in archives": 2,
        "hard links in archives": 1,
        "symbolic links in archives": 1,
        "devices or pipes in archives": 2,
        "members of an unknown type in archives": 1,
        "names in archives that are not UTF-8": 1,
        ".txt": 1,
        "no suffix": 1,
    }


def test_sidecars_apart_from_their_image_are_counted(tmp_path: Path) -> None:
    record = json.dumps({"id": "one"}).encode()
    members = {"0.json": record, "1.json": record, "0.jpg": b"x", "2.jpg": b"z", "2.json": b'{"id": "two"}'}
    manifest = _taken_in(Path(write_tar(tmp_path / "s.tar", members)), tmp_path)
    assert [i.as_py() for batch in manifest.ids() for i in batch] == ["s.tar/0.jpg", "two"]
    assert manifest.ignored == {"sidecars apart from their image in archives": 2}


def test_of_two_records_beside_an_image_the_plain_one_is_its_sidecar(tmp_path: Path) -> None:
    members = {"0.json": b'{"id": "one"}', "0.meta.json": b'{"id": "notes"}', "0.jpg": b"x"}
    manifest = _taken_in(Path(write_tar(tmp_path / "s.tar", members)), tmp_path)
    assert [i.as_py() for batch in manifest.ids() for i in batch] == ["one"]
    assert manifest.ignored == {"sidecars apart from their image in archives": 1}


@pytest.mark.parametrize("name", ["../3.jpg", "a/../../3.jpg", "/3.jpg"])
def test_a_member_that_leaves_its_folder_is_a_row_and_then_a_reject(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "s.tar", {name: b"x"})
    (row,) = read_rows(path)
    assert row["image"] == name
    with pytest.raises(Rejected, match="leaves the archive") as caught:
        ImageReader(str(tmp_path)).read(name, row["container"], row["offset"], row["size"])
    assert caught.value.reason == "outside_root"


@pytest.mark.parametrize("layout", ["gnu", "pax"])
def test_sparse_images_are_refused_by_name(tmp_path: Path, layout: str) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"start")
        file.seek(1 << 19)
        file.write(b"middle")
    command = ["tar", f"--format={layout}", "--sparse", "-cf", "s.tar", "holes.jpg"]
    try:
        subprocess.run(command, check=True, cwd=tmp_path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("GNU tar is not installed")
    assert "s.tar: holes.jpg is stored sparse" in _refused(tmp_path / "s.tar")


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_both_layouts_are_read(tmp_path: Path, layout: int) -> None:
    names = ["x" * 300 + ".jpg", "ü" * 150 + "/" + "y" * 120 + ".jpg", "short.jpg"]
    with tarfile.open(tmp_path / "s.tar", "w", format=layout, pax_headers={"comment": "all"}) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [row["image"] for row in read_rows(str(tmp_path / "s.tar"))] == names


def test_a_name_twice_is_refused_near_and_far(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.jpg": b"x"}))
    _add(path, "a.jpg", content=b"newer")
    assert "key a has 2 images (a.jpg, a.jpg)" in _refused(path)
    path = Path(write_tar(tmp_path / "s.tar", {"a.jpg": b"x", "b.jpg": b"y"}))
    _add(path, "a.jpg", content=b"newer")
    with pytest.raises(UserError, match="1 of 3 ids repeat .first: s.tar/a.jpg"):
        _taken_in(path, tmp_path)


def test_archives_without_an_image(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {}))
    with pytest.raises(UserError, match="s.tar is empty: it names no image$"):
        _taken_in(path, tmp_path)
    _add(path, "a.txt")
    with pytest.raises(UserError, match="it names no image .found: 1 .txt"):
        _taken_in(path, tmp_path)
    path.write_bytes(b"")
    assert "not a whole tar file (empty file)" in _refused(path)
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    assert "s.tar is not a whole tar file" in _refused(path)


@pytest.mark.parametrize(
    ("ending", "packed", "unpacker"),
    [
        ("tar", bz2.compress(b"x"), "bunzip2"),
        ("tar", lzma.compress(b"x"), "unxz"),
        ("tar", b"\x28\xb5\x2f\xfd\x04", "unzstd"),
        ("tar.bz2", b"", "bunzip2"),
        ("tar.xz", b"", "unxz"),
        ("tar.zst", b"", "unzstd"),
        ("txz", b"", "unxz"),
    ],
    ids=["bz2 as tar", "xz as tar", "zst as tar", "tar.bz2", "tar.xz", "tar.zst", "txz"],
)
def test_compressed_archives_name_what_unpacks_them(
    tmp_path: Path, ending: str, packed: bytes, unpacker: str
) -> None:
    (tmp_path / f"s.{ending}").write_bytes(packed)
    assert f"s.{ending} is compressed" in (line := _refused(tmp_path / f"s.{ending}"))
    assert line.endswith(f": {unpacker} it first")


def test_a_negative_size_does_not_lead_back(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", {"a.jpg": b"x", "b.jpg": b"y"}))
    content = bytearray(path.read_bytes())
    content[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    content[1024 + 148 : 1024 + 156] = b" " * 8
    content[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(content[1024:1536])
    path.write_bytes(content)
    assert "not a whole tar file" in _refused(path)


def test_damage_anywhere_is_refused_or_changes_no_number(tmp_path: Path) -> None:
    """Headers carry a checksum: whatever is overwritten, no image may be missing without a word."""
    path = tmp_path / "s.tar"
    plain = _images(path, range(12), size=100)
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        content = bytearray(plain)
        at, length = chance.randrange(12 * 1024), chance.choice((1, 8, 512, 600))
        content[at : at + length] = chance.choice((bytes(length), chance.randbytes(length)))
        path.write_bytes(content)
        try:
            found = len(list(read_rows(str(path))))
        except UserError:
            refused += 1
        else:
            assert found == 12, f"{length} bytes at {at}"
    assert refused > 100
