"""A resume with another input: more images join a run, other images never do."""

import shutil
import tarfile
from pathlib import Path

import pytest
import yaml

from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.sessions import begin_session
from tests.commands import rows, write_images
from tests.e2e.requests import commit, jsonl, refusal, request

NAMES = [f"{index:02}.jpg" for index in range(12)]


@pytest.fixture
def images(tmp_path: Path, no_ray: None) -> Path:
    write_images(tmp_path / "images", NAMES)
    return tmp_path / "images"


def _begun(images: str | Path, out: str | Path, *more: str | Path) -> Path:
    """A run of which one image is committed."""
    run = Path(out)
    assert request(images, run, *more) == 130
    commit(run, rows(run, "manifest")["id"][0].as_py())
    return run


def _held(run: Path) -> int:
    return len(rows(run, "manifest"))


def test_dedupe_image_stays(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(images / "list.jsonl", *({"id": f"id {name}", "image": name} for name in NAMES))
    for before, now in (((), ("--dedupe-image",)), (("--dedupe-image",), ())):
        run = _begun(path, tmp_path / f"run{len(before)}", *before)
        line = refusal(capsys, path, run, *now)
        assert line.startswith(f"--dedupe-image: changed since this run began ({bool(before)} before, ")
        assert line.endswith("restore it, or give another --out")
        assert request(path, run, "--dry-run", *now) == 2
        assert _held(run) == 12 and request(path, run, *before) == 130


def test_another_root_under_which_ids_differ_is_refused_with_both_inputs(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of tar shards the path below the root is part of the ids."""
    shards = tmp_path / "data" / "shards"
    shards.mkdir(parents=True)
    with tarfile.open(shards / "0.tar", "w") as tar:
        for name in NAMES:
            tar.add(images / name, name)
    run = _begun(shards, tmp_path / "run")
    line = refusal(capsys, shards, run, "--root", shards.parent)
    assert f"{shards} below {shards.parent} has 0 of the 12 ids in {run}/manifest, which" in line
    assert f"read from {shards} below {shards}: put --images and --root back, or give another --out" in line
    assert request(shards, run, "--root", shards.parent, "--dry-run") == 2
    assert _held(run) == 12 and request(shards, run) == 130


def test_other_images_are_refused_and_more_images_join(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _begun(images, tmp_path / "run")
    write_images(tmp_path / "others", [f"other {name}" for name in NAMES])
    assert f"{tmp_path}/others" in refusal(capsys, tmp_path / "others", run, "--limit", "12")
    write_images(images, [f"new {name}" for name in NAMES])
    assert request(images, run) == 130 and _held(run) == 24
    (images / NAMES[0]).unlink()
    assert request(images, run) == 130 and _held(run) == 24


@pytest.mark.parametrize("listed", [False, True])
def test_a_moved_root_with_the_same_ids_resumes(images: Path, tmp_path: Path, listed: bool) -> None:
    path = jsonl(tmp_path / "list.jsonl", *({"id": f"id {name}", "image": name} for name in NAMES))

    def arguments(root: Path) -> tuple[str | Path, ...]:
        return (path, tmp_path / "run", "--root", root) if listed else (root, tmp_path / "run")

    run = _begun(*arguments(images))
    moved = tmp_path / "moved"
    shutil.move(images, moved)
    assert request(*arguments(moved)) == 130
    assert _held(run) == 12
    assert yaml.safe_load((run / "run.yaml").read_text())["root"] == str(moved)


def test_first_images_and_a_sample_of_one_manifest_need_not_overlap(images: Path, tmp_path: Path) -> None:
    run = _begun(images, tmp_path / "run", "--limit", "1")
    assert request(images, run, "--sample", "3") == 130 and _held(run) in (3, 4)
    assert request(images, run) == 130 and _held(run) == 12


def test_a_run_of_the_code_before_resumes_as_it_is(images: Path, tmp_path: Path) -> None:
    """Its run.yaml may say nothing of dedupe_image."""
    run = _begun(images, tmp_path / "run")
    settings = yaml.safe_load((run / "run.yaml").read_text())
    del settings["config"]["dedupe_image"]
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    assert request(images, run) == 130 and _held(run) == 12


@pytest.mark.parametrize("field", ["limit", "sample"])
def test_fewer_images_than_a_run_holds_are_refused_while_some_are_to_do(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    run = _begun(images, tmp_path / "run")
    line = refusal(capsys, images, run, f"--{field}", "5")
    assert line == (
        f"--{field}: 5 is less than the 12 images that this run holds, of which 11 are still to do: "
        f"leave --{field} out, or give another --out"
    )
    assert request(images, run, f"--{field}", "5", "--dry-run") == 2
    assert request(images, run, f"--{field}", "12") == 130
    commit(run, *NAMES[1:])
    assert request(images, run, f"--{field}", "5") == 0 and len(rows(run, "captions")) == 12


def test_the_same_limit_resumes_although_the_run_has_grown(images: Path, tmp_path: Path) -> None:
    run = _begun(images, tmp_path / "run", "--limit", "3")
    write_images(images, ["000.jpg"])  # it is the first one now
    for _ in range(2):
        assert request(images, run, "--limit", "3") == 130 and _held(run) == 4


def test_a_retry_that_was_killed_goes_on_with_the_same_command(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _begun(images, tmp_path / "run")
    begin_session(CaptionRun(run), 0.0)
    commit(run, *NAMES[1:], rejected=True)
    assert request(images, run, "--retry-rejects") == 130
    begin_session(CaptionRun(run), 0.0)
    commit(run, *NAMES[1:5], rejected=True, session=1)
    capsys.readouterr()
    assert request(images, run, "--retry-rejects") == 130
    assert "5 of 12 images are done" in capsys.readouterr().err
    assert request(images, run, "--retry-rejects", "--dry-run") == 0
    assert "5 of 12 images are done" in capsys.readouterr().out
    commit(run, *NAMES[5:], session=1)
    # All are done, so the run is finished, four of its rejects still refused: now they may be tried again.
    assert request(images, run, "--retry-rejects", "--max-reject-rate", "1") == 0
    assert request(images, run, "--retry-rejects") == 130
    assert "8 of 12 images are done" in capsys.readouterr().err
