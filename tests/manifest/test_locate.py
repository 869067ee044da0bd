import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.manifest import read_rows
from sharegpt4v.manifest.locate import locate
from tests.manifest.conftest import write_jsonl


def test_path_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").touch()
    with pytest.raises(UserError, match=r"does not exist: did you mean .*/captions.jsonl\?$"):
        locate(str(tmp_path / "caption.jsonl"), None)


def test_missing_folder_on_the_way_is_the_one_named(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*/photos\?$"):
        locate(str(tmp_path / "photo" / "2024" / "x.json"), None)


def test_root_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"image": "a.jpg"}])
    with pytest.raises(UserError, match="image root .*/nowhere is not a folder"):
        locate(path, str(tmp_path / "nowhere"))


def test_default_root_is_the_folder_of_the_manifest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"image": "a.jpg"}])
    assert locate(path, None).root == str(tmp_path)
    assert locate(path, str(tmp_path.parent)).root == str(tmp_path.parent)


def test_unknown_suffix_and_unknown_protocol_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,image\n")
    with pytest.raises(UserError, match=r"suffix \.csv\); give an image folder"):
        list(read_rows(str(tmp_path / "m.csv")))
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        list(read_rows("nosuch://bucket/m.json"))


def test_glob_reads_its_files_in_order_and_refuses_to_match_nothing(tmp_path: Path) -> None:
    for number in (2, 1):
        write_jsonl(tmp_path / f"part-{number}.jsonl", [{"image": f"{number}.jpg"}])
    assert [row["image"] for row in read_rows(str(tmp_path / "part-*.jsonl"))] == ["1.jpg", "2.jpg"]
    with pytest.raises(UserError, match="matches no file"):
        locate(str(tmp_path / "none-*.jsonl"), None)


def test_wildcards_in_a_name_that_exists_are_plain_characters(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m[1].jsonl", [{"image": "a.jpg"}])
    assert [row["image"] for row in read_rows(path)] == ["a.jpg"]


def test_remote_manifest_is_read_in_place() -> None:
    fsspec.filesystem("memory").pipe_file("/lists/m.json", b'[{"image": "a.jpg"}]')
    assert [row["image"] for row in read_rows("memory://lists/m.json")] == ["a.jpg"]
    with pytest.raises(UserError, match="does not exist: did you mean /lists/m.json"):
        locate("memory://lists/n.json", None)


def test_root_of_a_pattern_is_the_folder_before_its_first_wildcard(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        write_jsonl(tmp_path / part / "m.jsonl", [{"image": "1.jpg"}])
    assert locate(str(tmp_path / "*" / "m.jsonl"), None).root == str(tmp_path)


class _Store(MemoryFileSystem):  # type: ignore[misc]
    """A store that lists nothing, or opens nothing, once its token has expired."""

    protocol = "oss"
    expired = ""

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if self.expired == "before":
            raise PermissionError("The provided token has expired.")
        return {"name": path, "size": 3, "type": "file"}

    def open(self, *_: Any, **__: Any) -> Any:
        raise TimeoutError


@pytest.mark.parametrize(
    ("expired", "cause"),
    [("before", "PermissionError: The provided token has expired."), ("", "TimeoutError")],
)
def test_a_store_that_fails_is_named_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, expired: str, cause: str
) -> None:
    monkeypatch.setitem(_registry, "oss", _Store)
    monkeypatch.setattr(_Store, "expired", expired)
    with pytest.raises(RunFailed) as caught:
        list(read_rows("oss://bucket/list.jsonl"))
    assert str(caught.value) == f"oss://bucket/list.jsonl cannot be read: {cause}"


def test_two_colons_in_a_name_that_exists_are_plain_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a::b"
    folder.mkdir()
    path = write_jsonl(folder / "m.jsonl", [{"image": "a.jpg"}])
    assert [row["image"] for row in read_rows(path)] == ["a.jpg"]
    assert locate(path, None).root == locate(str(folder), str(folder)).root == str(folder)


@pytest.mark.parametrize("inside", [False, True])
def test_a_path_that_is_not_utf8_is_refused(
    tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / "photos").mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"caf\\udce9/photos': its name is not UTF-8, rename it"):
        locate("photos" if inside else str(folder / "photos"), None)
    with pytest.raises(UserError, match="its name is not UTF-8"):
        locate(str(tmp_path), "photos" if inside else str(folder / "photos"))
