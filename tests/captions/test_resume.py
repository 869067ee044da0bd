"""What is done and what is left, from every mixture of finished parts and sessions' files."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.captions.blocks import write_pending
from sharegpt4v.captions.finish import compact
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import SET_ASIDE, commit_outcomes, outcome_files, read_outcomes, set_aside
from sharegpt4v.captions.resume import RunProgress, begin_anew, has_outcomes, survey
from sharegpt4v.captions.sessions import begin_session
from sharegpt4v.errors import UserError
from sharegpt4v.records import OUTCOMES
from tests.captions.sessions import add_shard, begin, caption, commit, reject


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    return begin(tmp_path, ["c", "a", "d"], ["b", "e"])


def _left(run: CaptionRun, retry: str | None = None) -> list[str]:
    done, _ = survey(run, retry)
    return [key for path in write_pending(run, done, 2, 2) for key in pq.read_table(path)["id"].to_pylist()]


def test_a_new_run_has_everything_to_do(run: CaptionRun) -> None:
    assert survey(run)[1] == RunProgress(rows=5, captions=0, rejects=0)
    assert _left(run) == ["c", "a", "d", "b", "e"]


def test_one_file_may_hold_rows_of_several_shards(run: CaptionRun) -> None:
    commit(run, 0, "x", caption(run, "d"), reject(run, "b"), caption(run, "e"))
    assert survey(run)[1] == RunProgress(rows=5, captions=2, rejects=1)
    assert _left(run) == ["c", "a"]


def test_an_image_with_both_outcomes_counts_once_as_a_caption(run: CaptionRun) -> None:
    commit(run, 0, "x", reject(run, "a"))
    commit(run, 1, "y", caption(run, "a"), caption(run, "a"))
    assert survey(run)[1] == RunProgress(rows=5, captions=1, rejects=0)


def test_a_torn_or_empty_file_counts_for_nothing_and_stays_until_it_is_set_aside(run: CaptionRun) -> None:
    kept = commit(run, 0, "whole", caption(run, "a"))
    torn = commit(run, 0, "torn", caption(run, "b"))
    torn.write_bytes(torn.read_bytes()[:-9])
    empty = torn.with_name("empty.parquet")
    empty.touch()
    assert _left(run) == ["c", "d", "b", "e"]
    _, progress = survey(run)
    assert progress.unreadable == [empty, torn] and torn.exists()  # a dry run looks, too
    set_aside(progress.unreadable)
    assert outcome_files(run) == [kept] and torn.with_name("torn.parquet.unreadable").exists()
    assert has_outcomes(run) and not survey(run)[1].unreadable


def test_whatever_the_disk_does_to_a_commit_it_is_whole_or_done_again(run: CaptionRun) -> None:
    """Blocks that were never written read as zeros, while footer and length are as they should be."""
    folder = run.outcomes / "0000"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist([caption(run, key, f"Text of {key}.") for key in "cad"], OUTCOMES)
    path = commit_outcomes(table, folder)
    whole = path.read_bytes()
    commit(run, 0, "others", caption(run, "b"), caption(run, "e"))
    lost = {"survey": 0, "finish": 0}
    for start in range(0, len(whole), 16):
        path.write_bytes(whole[:start] + bytes(32) + whole[start + 32 :])
        left = _left(run)
        if left:
            lost["survey"] += 1
            assert left == ["c", "a", "d"] and read_outcomes(path) is None
        elif read_outcomes(path) is None:  # in a column that the survey does not read
            lost["finish"] += 1
            with pytest.raises(
                UserError, match=r"1 files of outcomes are damaged and were set aside \(work/"
            ):
                compact(run)
            assert _left(run) == ["c", "a", "d"] and not path.exists()
            path.with_name(path.name + SET_ASIDE).unlink()
        else:
            assert read_outcomes(path) == table
    assert min(lost.values()) > 50


def test_a_damaged_part_is_named_with_the_remedy(run: CaptionRun) -> None:
    commit(run, 0, "x", *[caption(run, key) for key in "cadbe"])
    compact(run)
    part = run.captions / "part-00001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(UserError, match="captions/part-00001.parquet is damaged: remove it, then give"):
        survey(run)
    part.unlink()
    assert _left(run) == ["b", "e"]


def test_a_storage_that_fails_says_nothing_of_a_commit(
    run: CaptionRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run, 0, "x", caption(run, "a"))

    def fails(_: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match="Input/output"):
        survey(run)


def test_files_of_later_sessions_come_later(run: CaptionRun) -> None:
    paths = [commit(run, number, name, caption(run, "a")) for number, name in ((10, "a"), (2, "z"), (2, "b"))]
    assert outcome_files(run) == [paths[2], paths[1], paths[0]]


def test_a_commit_that_is_repeated_takes_the_place_of_the_first(run: CaptionRun) -> None:
    folder = run.outcomes / "0000"
    folder.mkdir(parents=True)
    for keys in ("ca", "b", "ca", "c"):
        commit_outcomes(pa.Table.from_pylist([caption(run, key) for key in keys], OUTCOMES), folder)
    assert [str(path.relative_to(folder)) for path in outcome_files(run)] == [
        "00000/00000-000000000-000001.parquet",
        "00000/00000-000000000-000002.parquet",
        "00001/00001-000000000-000001.parquet",
    ]
    assert _left(run) == ["d", "e"]


def test_a_commit_is_there_whole_or_not_at_all(run: CaptionRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.outcomes / "0000"
    table = pa.Table.from_pylist([caption(run, "c")], OUTCOMES)
    with pytest.raises(FileNotFoundError):
        commit_outcomes(
            table, folder
        )  # not made here: on a node that does not share the folder it would hide
    folder.mkdir(parents=True)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        commit_outcomes(table, folder)
    assert outcome_files(run) == []
    assert _left(run) == ["c", "a", "d", "b", "e"]


def test_finished_parts_count_as_done(run: CaptionRun) -> None:
    commit(run, 0, "x", *[caption(run, key) for key in "cabe"], reject(run, "d"))
    compact(run)
    assert not run.outcomes.exists()
    assert survey(run)[1] == RunProgress(rows=5, captions=4, rejects=1)
    assert _left(run) == []


def test_new_shards_are_pending_behind_finished_ones(run: CaptionRun) -> None:
    commit(run, 0, "x", *[caption(run, key) for key in "cadbe"])
    compact(run)
    add_shard(run, ["f", "g"])
    commit(run, 1, "y", caption(run, "g"))
    assert survey(run)[1] == RunProgress(rows=7, captions=6, rejects=0)
    assert _left(run) == ["f"]


@pytest.mark.parametrize("finished", [False, True])
def test_rejects_are_taken_up_again_by_reason_or_all(run: CaptionRun, finished: bool) -> None:
    commit(run, 0, "x", caption(run, "c"), reject(run, "a"), reject(run, "d", "truncated"))
    commit(run, 0, "y", caption(run, "b"), reject(run, "e"))
    if finished:
        compact(run)
    assert _left(run) == []
    assert _left(run, "missing") == ["a", "e"]
    assert _left(run, "truncated") == ["d"]
    assert _left(run, "all") == ["a", "d", "e"]
    assert survey(run, "missing")[1] == RunProgress(rows=5, captions=2, rejects=1)


def test_a_reject_that_was_captioned_since_is_not_taken_up(run: CaptionRun) -> None:
    commit(run, 0, "x", reject(run, "a"))
    commit(run, 1, "y", caption(run, "a"))
    assert "a" not in _left(run, "all")


def test_the_survey_counts_rejects_by_reason_also_those_to_be_tried_again(run: CaptionRun) -> None:
    commit(run, 0, "x", reject(run, "a"), caption(run, "b"))
    for retry in (None, "all"):
        _, progress = survey(run, retry)
        assert list(progress.reasons.values()) == [1]


def test_a_commit_or_a_finished_part_is_an_outcome_and_what_precedes_them_is_none(run: CaptionRun) -> None:
    assert not has_outcomes(run)
    _left(run)
    folder = begin_session(run, 0.0)
    (folder / ".00000-000000000-000001.parquet.0123456789abcdef").touch()  # killed while it was written
    assert not has_outcomes(run)
    commit(run, 0, "x", *[caption(run, key) for key in "cadbe"])
    assert has_outcomes(run)
    compact(run)
    assert has_outcomes(run) and not run.outcomes.exists()


def test_a_torn_commit_is_no_reason_to_clear_the_folder(run: CaptionRun) -> None:
    torn = commit(run, 0, "x", caption(run, "a"))
    torn.write_bytes(torn.read_bytes()[:-9])
    assert has_outcomes(run)


def test_a_new_beginning_clears_what_is_ours_and_keeps_old_workers_out(run: CaptionRun) -> None:
    old = begin_session(run, 0.0)
    _left(run)
    (run.path / "run.yaml").touch()
    (run.manifest / "notes.txt").touch()
    (run.work / "abandoned" / "0000").mkdir(parents=True)  # of a try that was killed at this
    begin_anew(run)
    assert not run.settings.exists() and not run.shards()
    assert (run.manifest / "notes.txt").exists() and not (run.work / "abandoned").exists()
    table = pa.Table.from_pylist([caption(begin(run.path / "other", ["c"]), "c")], OUTCOMES)
    assert begin_session(run, 0.0).name == "0001"
    with pytest.raises(FileNotFoundError):
        commit_outcomes(table, old)


def test_a_new_beginning_may_be_killed_anywhere(run: CaptionRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path / "lock.json").touch()
    (run.path / "run.yaml").touch()
    unlink = Path.unlink
    for lived in range(3):
        left = iter(range(lived))

        def dies(path: Path, missing_ok: bool = False, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", dies)
            with pytest.raises(KeyboardInterrupt):
                begin_anew(run)
        assert not has_outcomes(CaptionRun.open(run.path))
    assert [path.name for path in run.shards()] == ["part-00001.parquet"]
    begin_anew(run)
    assert not run.shards()
