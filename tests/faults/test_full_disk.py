"""A full disk ends a command in one line with the path and the remedy, and costs no commit."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import caption
from pipelines.steps import caption_job
from sharegpt4v.captions.layout import CaptionRun
from tests.captions.sessions import caption as committed_caption
from tests.captions.sessions import commit
from tests.commands import outcomes_left, rows, write_images

FAKE = ("--engine", "fake", "--fake.image-side", "24")
REMEDY = "free some space there, or move it to a larger disk; what was committed is kept: run the same"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder])
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


def _fill(disk: Path) -> None:
    with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that gets as far as Ray has written all that comes before it, and ends in 130."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(caption_job, "ray_session", interrupted)


def _last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_manifest_that_does_not_fit(
    without_ray: None, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": f"{index**5:x}", "image": f"{index**7:x}.jpg"} for index in range(40_000)]
    (tmp_path / "list.json").write_text(json.dumps(records))
    arguments = ["--images", str(tmp_path / "list.json"), "--out", str(disk / "run"), *FAKE]
    assert caption.main(arguments) == 1
    line = _last_line(capsys)
    assert line.startswith(f"sharegpt4v caption: the disk is full: {disk / 'run'}") and REMEDY in line
    assert [path.name for path in (disk / "run").iterdir()] == ["lock.json"]
    _grow(disk)
    assert caption.main(arguments) == 130


@pytest.mark.parametrize("full_at", ["the start", "the end"])
def test_a_disk_that_is_full_when_a_run_is_resumed_or_finished(
    without_ray: None, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], full_at: str
) -> None:
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    run = CaptionRun(disk / "run")
    arguments = ["--images", str(tmp_path / "images"), "--out", str(run.path), *FAKE]
    assert caption.main(arguments) == 130
    done = ["a.jpg"] if full_at == "the start" else ["a.jpg", "b.jpg"]
    commit(run, 0, "x", *(committed_caption(run, key) for key in done))
    _fill(disk)
    assert caption.main(arguments) == 1
    line = _last_line(capsys)
    assert line.startswith(f"sharegpt4v caption: the disk is full: {run.path}") and REMEDY in line
    assert outcomes_left(run.path) == len(done) and not run.success.exists()
    _grow(disk)
    assert caption.main(arguments) == (130 if full_at == "the start" else 0)


def test_a_commit_that_does_not_fit(
    caption_there: "Callable[..., subprocess.CompletedProcess[str]]", disk: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", [f"{index:03}.jpg" for index in range(100)])
    run = disk / "run"
    arguments = ("--images", tmp_path / "images", "--out", run, *FAKE, "--rows-per-commit", "1")
    done = caption_there(*arguments)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"sharegpt4v caption: the disk is full: {run}/work/outcomes") and REMEDY in line
    assert "Traceback" not in done.stderr
    assert 0 < outcomes_left(run) < 100
    _grow(disk)
    done = caption_there(*arguments)
    assert done.returncode == 0, done.stderr
    assert len(rows(run, "captions")) == 100
