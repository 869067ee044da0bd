"""A retry of rejects that is killed and given again."""

from pathlib import Path

import pytest

from sharegpt4v.captions.finish import compact
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import survey
from sharegpt4v.captions.retry import end_retry, note_retry, retry_since
from sharegpt4v.captions.sessions import begin_session
from tests.captions.sessions import begin, caption, commit, reject

ROOT = "/images"


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    """Three rejects and a caption of a first session, and a retry that was killed after two of them."""
    run = begin(tmp_path, ["a", "b", "c", "d"])
    begin_session(run, 0.0)
    commit(run, 0, "x", caption(run, "a"), *[reject(run, key) for key in "bcd"])
    assert _left(run, "all") == 3
    note_retry(run, "all", ROOT, retry_since(run, "all", ROOT))
    begin_session(run, 0.0)
    commit(run, 1, "y", reject(run, "b"), caption(run, "c"))
    return run


def _left(run: CaptionRun, reason: str, root: str = ROOT) -> int:
    """How many images a command with this reason would try."""
    done, _ = survey(run, reason, retry_since(run, reason, root))
    return int(sum((~flags).sum() for flags in done))


def test_what_was_refused_meanwhile_is_not_tried_again(run: CaptionRun) -> None:
    assert _left(run, "all") == 1
    begin_session(run, 0.0)
    commit(run, 2, "z", reject(run, "d"))
    assert _left(run, "all") == 0


def test_another_reason_or_root_is_another_retry(run: CaptionRun) -> None:
    assert _left(run, "missing") == 2
    assert _left(run, "all", "/repaired") == 2


def test_a_retry_ends_with_the_finish_or_when_too_much_is_rejected(run: CaptionRun) -> None:
    end_retry(run)
    assert _left(run, "all") == 2
    note_retry(run, "all", ROOT, 1)
    compact(run)
    assert not run.retry.exists() and _left(run, "all") == 2


def test_no_credential_is_kept(run: CaptionRun) -> None:
    note_retry(run, "all", "s3://key:secret@bucket", 1)
    assert "secret" not in run.retry.read_text()
    assert retry_since(run, "all", "s3://key:secret@bucket") == 1
