"""How a run ends: what is written, what is said, and with which exit code."""

import time
from pathlib import Path

import pytest

from pipelines.steps.finishing import conclude, finish
from pipelines.steps.job import CaptionJob, make_job
from pipelines.steps.phases import Phases
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.sessions import begin_session
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.run.settings import write_settings
from tests.captions.sessions import begin, caption, commit, reject


def _job(run: CaptionRun, max_reject_rate: float = 0.05) -> CaptionJob:
    config = CaptionConfig(images="x", out=run.path, engine="fake", max_reject_rate=max_reject_rate)
    return make_job(config)


def _run(path: Path, captions: int, rejects: int) -> CaptionRun:
    """All images committed by one session, nothing finished yet."""
    ids = [f"{index:03}" for index in range(captions + rejects)]
    run = begin(path, ids)
    begin_session(run, 0.0)
    rows = [caption(run, key) for key in ids[:captions]] + [reject(run, key) for key in ids[captions:]]
    commit(run, 0, "all", *rows)
    return run


def _finish(run: CaptionRun, max_reject_rate: float = 0.05) -> int:
    job = _job(run, max_reject_rate)
    write_settings(run, job.config.model_dump(mode="json"), job.fingerprint, job.facts(str(run.path)))
    return finish(job, run, str(run.path), Phases(time.time()))


def test_a_run_without_a_caption_ends_with_1_and_a_report_but_without_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path, 0, 20)
    assert _finish(run, max_reject_rate=1.0) == 1
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("sharegpt4v caption: no caption was written: all 20 images were rejected")
    assert f"report: {run.report}" in printed.out
    assert run.report.exists() and not run.success.exists()


def test_two_rejects_of_ten_are_a_success_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path, 8, 2)
    assert _finish(run) == 0 and run.success.exists()
    *_, warning, line = capsys.readouterr().err.splitlines()
    assert warning == "warning: the fake engine looks at no image: its captions describe nothing"
    assert line.startswith("sharegpt4v caption: 2 of 10 images were rejected (20.0%")


def test_above_the_limit_a_larger_run_is_no_success_until_the_limit_is_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path, 56, 4)
    assert _finish(run) == 1 and not run.success.exists()
    assert "4 of 60 images were rejected" in capsys.readouterr().err
    assert _finish(run, max_reject_rate=0.1) == 0 and run.success.exists()
    assert "rejected" not in capsys.readouterr().err
    # A finished run asked for again is judged by what is asked for now.
    assert conclude(_job(run), run) == 1 and not run.success.exists()
