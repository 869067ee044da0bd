"""Bad input through the real command: each bad image is one reject, each wrong request is one line."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.steps import caption_job
from tests.commands import PHOTOS, needs_photos, rows, sharegpt4v, write_images
from tests.e2e.requests import FAKE, commit, jsonl, refusal, request
from tests.images.every_kind import BAD, write_bad, write_odd


def test_every_bad_image_is_a_reject_and_every_odd_one_a_caption(
    caption_there: "Callable[..., subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    images, run = tmp_path / "ïmages 漢字", tmp_path / "rün 1"
    (tmp_path / "secret").write_text("secret")
    write_bad(images / "bad", outside=tmp_path / "secret")
    odd = write_odd(images / "odd")
    (images / "odd" / "twin.jpg").write_bytes((images / "odd" / "grey.jpg").read_bytes())
    (images / "odd" / "linked inside.jpg").symlink_to("target.jpg")
    done = caption_there("--images", images, "--out", run, "--max-reject-rate", "1", *FAKE)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    rejects = rows(run, "rejects").to_pylist()
    assert {row["id"]: row["reason"] for row in rejects} == {f"bad/{name}": BAD[name] for name in BAD}
    assert {row["stage"] for row in rejects} == {"decode"}
    captions = {row["id"]: row for row in rows(run, "captions").to_pylist()}
    # Equal bytes under two ids are allowed, and so is a link that stays below the root.
    assert sorted(captions) == sorted(f"odd/{name}" for name in [*odd, "twin.jpg", "linked inside.jpg"])
    assert captions["odd/twin.jpg"]["caption"] == captions["odd/grey.jpg"]["caption"]
    assert captions["odd/linked inside.jpg"]["image_sha256"] == captions["odd/target.jpg"]["image_sha256"]
    assert (captions["odd/1x1.png"]["width"], captions["odd/1x1.png"]["height"]) == (1, 1)
    assert json.loads((run / "summary.json").read_text())["rejects"] == len(BAD)
    assert (run / "_SUCCESS").exists()


def test_a_run_without_a_caption_fails_until_its_images_are_repaired(
    caption_there: "Callable[..., subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    names = [f"{index:02}.jpg" for index in range(20)]
    write_images(images, names)
    good = {name: (images / name).read_bytes() for name in names}
    for name in names:
        (images / name).write_text("<html>not found</html>")
    arguments = ("--images", images, "--out", run, *FAKE)
    for _ in range(2):  # the second finds nothing to do but to finish
        done = caption_there(*arguments)
        assert done.returncode == 1 and "no caption was written" in done.stderr
        assert not (run / "_SUCCESS").exists()
    for name, content in good.items():
        (images / name).write_bytes(content)
    done = caption_there(*arguments, "--retry-rejects")
    assert done.returncode == 0, done.stderr
    assert len(rows(run, "captions")) == 20 and (run / "_SUCCESS").exists()


@needs_photos
def test_real_photographs_are_captioned(
    caption_there: "Callable[..., subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    done = caption_there("--images", PHOTOS, "--out", tmp_path / "run", *FAKE)
    assert done.returncode == 0, done.stderr
    captions = rows(tmp_path / "run", "captions")
    assert len(captions) >= 30 and len(rows(tmp_path / "run", "rejects")) == 0
    assert min(captions["width"].to_pylist()) > 100


@pytest.fixture
def images(tmp_path: Path, no_ray: None) -> Path:
    """Three good images."""
    write_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    return tmp_path / "images"


def test_a_good_request_is_not_refused(images: Path, tmp_path: Path) -> None:
    assert request(images, tmp_path / "run") == 130


def test_duplicate_ids_are_listed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"id": name, "image": "a.jpg"} for name in ("x", "y", "x", "y", "z")]
    line = refusal(capsys, jsonl(images / "list.jsonl", *records), tmp_path / "run")
    assert "2 of 5 ids repeat (first: x, y)" in line


def test_an_empty_manifest(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "empty.json").write_text("[]")
    assert "is empty: it names no image" in refusal(capsys, images / "empty.json", tmp_path / "run")


def test_a_folder_without_an_image(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    assert "holds no image (found: 1 .txt)" in refusal(capsys, tmp_path / "texts", tmp_path / "run")


def test_a_missing_column(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "list.jsonl").write_text('{"id": "1", "img": "a.jpg"}\n')
    assert "image" in refusal(capsys, images / "list.jsonl", tmp_path / "run")


def test_a_wrong_type(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, jsonl(images / "list.jsonl", {"id": "1", "image": 5}), tmp_path / "run")
    assert "record 1" in line and "5" in line


def test_a_half_written_last_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = images / "list.jsonl"
    path.write_text('{"id": "1", "image": "a.jpg"}\n{"id": "2", "ima')
    line = refusal(capsys, path, tmp_path / "run")
    assert "list.jsonl" in line and "2" in line


def test_images_that_do_not_exist_name_the_nearest(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, tmp_path / "imagse", tmp_path / "run")
    assert f"imagse does not exist: did you mean {images}?" in line


def test_a_root_that_does_not_exist_names_the_nearest(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "list.jsonl", {"image": "a.jpg"})
    line = refusal(capsys, path, tmp_path / "run", "--root", tmp_path / "image")
    assert f"did you mean {images}?" in line


def test_an_out_that_is_a_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert f"--out: cannot write to {tmp_path}/file: File exists" in refusal(
        capsys, images, tmp_path / "file"
    )


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run", "x" * 300])
def test_an_out_that_cannot_be_written(images: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    assert f"--out: cannot write to {out}" in refusal(capsys, images, out)


def test_an_out_that_holds_other_files(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A folder called work is no sign of a run: people have those.
    (tmp_path / "home" / "work").mkdir(parents=True)
    assert "holds other files (work, ...)" in refusal(capsys, images, tmp_path / "home")
    assert "holds other files (a.jpg, ...)" in refusal(capsys, images, images)


@pytest.mark.parametrize("out", ["s3://bucket/run", "file:///tmp/run"])
def test_an_out_that_is_a_uri(images: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    assert "is a URI: it must be a local or shared folder" in refusal(capsys, images, out)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("--decoding.max-new-tokens", ("--decoding.max-new-tokens", "7")),
        ("--decoding.min-new-tokens", ("--decoding.min-new-tokens", "7")),
        ("--prompt", ("--prompt", "What is this?")),
        ("--fast-decode", ("--fast-decode",)),
        ("image_size", ("--fake.image-side", "32")),
        ("--gate.min-characters", ("--gate.min-characters", "3")),
        ("--protocol", ("--protocol", "pad")),
    ],
)
def test_another_configuration_is_refused_on_resume(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, change: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert request(images, run) == 130
    assert request(images, run, *change) == 130  # nothing was committed that could differ
    assert request(images, run) == 130
    commit(run, "b.jpg")
    before = (run / "run.yaml").read_bytes()
    assert refusal(capsys, images, run, *change).startswith(f"{field}: changed since this run began (")
    assert (run / "run.yaml").read_bytes() == before


def test_what_changes_no_row_may_change_on_resume(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert request(images, run) == 130
    commit(run, "b.jpg")
    assert request(images, run, "--actors", "1", "--rows-per-commit", "2", "--hang-seconds", "9") == 130


def test_a_changed_row_is_refused_on_resume(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = tmp_path / "run", images / "list.jsonl"
    assert request(jsonl(path, {"id": "1", "image": "a.jpg"}, {"id": "2", "image": "b.jpg"}), run) == 130
    commit(run, "1")
    jsonl(path, {"id": "1", "image": "a.jpg"}, {"id": "2", "image": "c.jpg"})
    line = refusal(capsys, path, run)
    assert "1 ids are in" in line and "with another image or source (first: 2)" in line


def _ids(run: Path) -> list[str]:
    ids: list[str] = rows(run, "manifest")["id"].to_pylist()
    return ids


def test_a_first_try_that_committed_nothing_binds_neither_input_nor_root(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even when it was killed while a try before it was being cleared away."""
    run, path = tmp_path / "run", images / "list.jsonl"
    assert request(jsonl(path, {"id": "1", "image": "a.jpg"}, {"id": "2", "image": "b.jpg"}), run) == 130
    jsonl(path, {"id": "2", "image": "c.jpg"})
    assert request(path, run) == 130 and _ids(run) == ["2"]

    (run / "run.yaml").unlink()
    (run / ".probe-1").touch()
    other = tmp_path / "other"
    write_images(other, ["d.jpg", "e.jpg"])
    assert request(other, run) == 130 and _ids(run) == ["d.jpg", "e.jpg"]

    assert request(images, run, "--limit", "2") == 130 and _ids(run) == ["a.jpg", "b.jpg"]
    commit(run, "b.jpg")
    assert "has 0 of the 2 ids in" in refusal(capsys, other, run)
    assert request(images, run) == 130 and _ids(run) == ["a.jpg", "b.jpg", "c.jpg"]


def test_an_interrupted_run_says_what_is_saved_and_how_to_go_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert request(images, run) == 130
    line = f"interrupted before the first commit: nothing is saved in {run}, the same command begins anew"
    assert capsys.readouterr().err.splitlines()[-1] == line
    commit(run, "b.jpg")
    assert request(images, run) == 130
    line = f"interrupted: 1 of 3 images are saved in {run}; the same command goes on from there"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_terminated_run_ends_like_an_interrupted_one(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(caption_job, "ray_session", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert request(images, tmp_path / "run") == 130
    assert "interrupted before the first commit" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_folder_of_another_version(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert request(images, run) == 130
    settings = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(settings.replace("schema_version: 1", "schema_version: 99"))
    assert "was written with run folder version 99" in refusal(capsys, images, run)


def test_an_unknown_preset(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, images, tmp_path / "run", "--preset", "70b")
    assert "70b" in line and '"toy", "7b"' in line


def test_an_unknown_flag_names_the_nearest(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, images, tmp_path / "run", "--decoding.max-tokens", "5")
    assert line == "Unknown option: --decoding.max-tokens. Did you mean --decoding.max-new-tokens?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "decoding: {max_tokens: 5}",
            "unknown key decoding.max_tokens; did you mean decoding.max_new_tokens?",
        ),
        ("batchsize: 5", "unknown key batchsize; did you mean batch_size?"),
        ("batch_size: many", "--batch-size: 'many' is refused"),
        ("[1, 2]", "holds a list, expected keys and values"),
        ("a: [", "is not YAML"),
        ("preset: 70b", "--preset: '70b' is unknown; known: toy, 7b"),
    ],
)
def test_a_configuration_file_with_a_mistake(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert expected in refusal(capsys, images, tmp_path / "run", "--config", tmp_path / "config.yaml")


def test_a_model_that_does_not_exist(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(
        capsys, images, tmp_path / "run", "--engine", "torch", "--model", tmp_path / "share-captioner"
    )
    assert "share-captioner" in line
    assert not (tmp_path / "run").exists()


def test_a_refused_request_leaves_no_traceback_in_a_terminal(tmp_path: Path) -> None:
    done = sharegpt4v("caption", "--images", tmp_path / "nowhere", "--out", tmp_path / "run", *FAKE)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and " s  reading " in lines[0] and lines[1].startswith("sharegpt4v caption: ")
