"""What the caption job says of its input before it works."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.steps.intake import drop_unreadable, is_remote, say_progress, take_in
from pipelines.steps.job import CaptionJob, make_job
from pipelines.steps.phases import Phases
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import RunProgress, survey
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import UserError
from sharegpt4v.run.settings import write_settings
from tests.captions.sessions import begin, caption, commit
from tests.commands import write_images


def _job(tmp_path: Path, run: Path) -> CaptionJob:
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    return make_job(CaptionConfig(images=str(tmp_path / "images"), out=run, engine="fake"))


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (None, []),
        ("all", []),
        ("missing", []),
        ("misssing", ["no reject has the reason 'misssing'; there are: missing (1,200), truncated (3)"]),
    ],
)
def test_a_mistyped_reason_to_retry_is_answered_with_those_there_are(
    reason: str | None, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = RunProgress(2_000, 797, 1_203, {"missing": 1_200, "truncated": 3})
    say_progress(reason, progress, Phases(time.time()))
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["2,000 of 2,000 images are done", *said]


def test_a_new_run_says_how_many_images_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    say_progress(None, RunProgress(2_000, 0, 0), Phases(time.time()))
    assert capsys.readouterr().err.endswith(" s  2,000 images\n")


@pytest.mark.parametrize(
    ("root", "image", "container", "remote"),
    [
        ("/photos", "a.jpg", "", False),
        ("/photos", "a.jpg", "0001.tar", False),
        ("s3://bucket/photos", "a.jpg", "", True),
        ("/photos", "https://host/a.jpg", "", True),
        ("/photos", "a.jpg", "gs://bucket/0001.tar", True),
    ],
)
def test_images_that_come_over_a_network(
    tmp_path: Path, root: str, image: str, container: str, remote: bool
) -> None:
    pending = tmp_path / "part-00000.parquet"
    pq.write_table(pa.table({"image": ["b.jpg", image], "container": ["", container]}), pending)
    assert is_remote(root, [pending]) is remote
    assert is_remote(root, []) is ("://" in root)


def test_damaged_commits_are_named_and_their_images_come_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path, ["a", "b", "c"])
    for key in "abc":
        path = commit(run, 0, key, caption(run, key))
        if key != "c":
            path.write_bytes(bytes(300) + path.read_bytes()[300:])
    _, progress = survey(run)
    drop_unreadable(run, progress, Phases(time.time()))
    said = capsys.readouterr().err.partition(" s  ")[2]
    files = "work/outcomes/0000/a.parquet, work/outcomes/0000/b.parquet"
    assert said == f"damaged and set aside, their images are done again: {files}\n"
    _, progress = survey(run)
    assert progress.done == 1
    drop_unreadable(run, progress, Phases(time.time()))
    assert capsys.readouterr().err == ""


def test_a_run_of_another_command_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    run = CaptionRun.open(tmp_path / "trained")
    write_settings(run, {"data": ["captions.json"]}, {"stage": "sft"}, {"stage": "sft", "model": "m@1"})
    (run.work / "outcomes").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    with pytest.raises(UserError, match="holds a run of another command"):
        take_in(_job(tmp_path, run.path), run, Phases(time.time()))
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_outcomes_without_their_settings_are_not_mixed_with_others(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", ["a.jpg", "b.jpg"])
    commit(run, 0, "a", caption(run, "a.jpg"))
    with pytest.raises(UserError, match=r"no run\.yaml .*: restore that file"):
        take_in(_job(tmp_path, run.path), run, Phases(time.time()))
