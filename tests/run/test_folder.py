"""The run folder: who may begin or resume one, and files that appear whole."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.sessions import begin_session
from sharegpt4v.errors import UserError
from sharegpt4v.run.folder import make_writable, refuse_other_files
from sharegpt4v.run.settings import check_fingerprint, read_settings, write_settings

FINGERPRINT = {"model": "m@1", "prompt": "p@1: Describe.", "decoding.max_new_tokens": 500}
FACTS = {"root": "/images", "model": "m@1", "engine": "fake", "prompt_id": "p@1", "prompt_text": "Describe."}


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    run = CaptionRun.open(tmp_path / "new" / "rün")
    write_settings(run, {"images": "x"}, FINGERPRINT, FACTS)
    return run


def test_a_new_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    run = CaptionRun.open(tmp_path / "a" / "b")
    assert list(run.path.iterdir()) == []


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CaptionRun.open(Path("run")).path == tmp_path / "run"


@pytest.mark.parametrize("first", ["lock.json", "run.yaml"])
def test_a_run_killed_at_once_may_begin_again(tmp_path: Path, first: str) -> None:
    (tmp_path / first).touch()
    (tmp_path / "manifest").mkdir()
    assert CaptionRun.open(tmp_path).path == tmp_path


def test_a_probe_that_a_kill_left_does_not_close_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".probe-77").touch()
    refuse_other_files(tmp_path)  # a dry run writes nothing, and removes nothing
    assert CaptionRun.open(tmp_path).path == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_commands_that_try_one_folder_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make_writable, [tmp_path] * 400))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["work", "manifest", "photo.jpg"])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds other files \\({name}, ...\\)"):
        CaptionRun.open(tmp_path)


def test_settings_tell_all_that_a_reader_needs(run: CaptionRun) -> None:
    settings = read_settings(run.path)
    assert {key: settings[key] for key in FACTS} == FACTS
    assert settings["config"] == {"images": "x"} and settings["fingerprint"] == FINGERPRINT
    assert settings["versions"]["pyarrow"] and "git_revision" in settings


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        read_settings(tmp_path)


def test_the_same_fingerprint_and_a_new_folder_pass(run: CaptionRun, tmp_path: Path) -> None:
    check_fingerprint(run, dict(reversed(FINGERPRINT.items())))
    check_fingerprint(CaptionRun.open(tmp_path / "other"), FINGERPRINT)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"decoding.max_new_tokens": 7}, "decoding.max_new_tokens: changed.*\\(500 before, 7 now\\)"),
        ({"model": None}, "model: changed.*\\('m@1' before, None now\\)"),
        ({"dtype": "float32"}, "dtype: changed.*\\(None before, 'float32' now\\)"),
        ({"prompt": "p@2: " + "long " * 50}, "prompt: changed.*long l\\.\\.\\. now\\)"),
        ({"prompt": "two\nlines"}, "prompt: changed.*, 'two\\\\nlines' now\\)"),
    ],
)
def test_another_fingerprint_is_refused_with_the_field(
    run: CaptionRun, change: dict[str, object], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        check_fingerprint(run, FINGERPRINT | change)


def test_another_schema_version_is_refused_before_anything_else(run: CaptionRun) -> None:
    settings = yaml.safe_load((run.path / "run.yaml").read_text())
    (run.path / "run.yaml").write_text(yaml.safe_dump({"schema_version": settings["schema_version"] + 1}))
    with pytest.raises(UserError, match="was written with run folder version 2, this is version 1"):
        check_fingerprint(run, FINGERPRINT)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomic(path, "newer")
    assert path.read_text() == "newer" and list(tmp_path.iterdir()) == [path]


def test_sessions_are_numbered_after_all_earlier_ones(run: CaptionRun) -> None:
    assert [begin_session(run, 0.0).name for _ in range(3)] == ["0000", "0001", "0002"]
    for folder in run.outcomes.iterdir():  # the finish step removes them, the numbers go on
        folder.rmdir()
    assert begin_session(run, 0.0).name == "0003"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no settings"),
        ("- 1\n", "holds no settings"),
        ("a: [\n", "is no valid YAML"),
        ("[" * 100_000, "is no valid YAML"),
        ("schema_version: 1\nconfig: {}\n", "has no `fingerprint`"),
    ],
)
def test_settings_that_were_damaged_are_named(run: CaptionRun, text: str, problem: str) -> None:
    run.settings.write_text(text)
    with pytest.raises(UserError, match=rf"run\.yaml {problem}.*: restore that file"):
        check_fingerprint(run, FINGERPRINT)
