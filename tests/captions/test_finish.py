"""The finish step: the audit, and the summary's numbers."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sharegpt4v.captions.finish import close_times, commits, compact, summarise
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import survey
from sharegpt4v.captions.sessions import begin_session, note_engines
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.errors import UserError
from sharegpt4v.records import CAPTIONS, REJECTS
from tests.captions.sessions import add_shard, begin, caption, commit, reject


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    """Five images, all with an outcome, in files whose order is not the manifest's."""
    run = begin(tmp_path / "run", ["c", "a", "d"], ["b", "e"])
    commit(run, 0, "z", caption(run, "e"), caption(run, "d"))
    commit(run, 0, "a", reject(run, "b"), caption(run, "a"))
    commit(run, 1, "m", caption(run, "c"))
    return run


def _rows(run: CaptionRun, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run.path / part).to_pylist()
    return rows


def _ids(run: CaptionRun, part: str) -> list[str]:
    return [row["id"] for row in _rows(run, part)]


def _settled(run: CaptionRun) -> dict[str, list[dict[str, Any]]]:
    return {part: _rows(run, part) for part in ("captions", "rejects")}


def test_the_output_stands_in_manifest_order_a_part_for_each_shard(run: CaptionRun) -> None:
    compact(run)
    assert [pq.read_table(path)["id"].to_pylist() for path in sorted(run.captions.iterdir())] == [
        ["c", "a", "d"],
        ["e"],
    ]
    assert [pq.read_table(path)["id"].to_pylist() for path in sorted(run.rejects.iterdir())] == [[], ["b"]]
    assert pq.read_schema(run.captions / "part-00000.parquet") == CAPTIONS
    assert pq.read_schema(run.rejects / "part-00000.parquet") == REJECTS


def test_the_sessions_files_go_once_all_is_in_place(run: CaptionRun) -> None:
    run.pending.mkdir()
    compact(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["captions", "manifest", "rejects", "work"]
    assert list((run.path / "work").iterdir()) == []


def test_missing_rows_are_refused_by_name_and_nothing_is_moved(run: CaptionRun) -> None:
    add_shard(run, ["f", "g"])
    with pytest.raises(UserError, match="2 images have no outcome yet \\('f', 'g', ...\\): run the same"):
        compact(run)
    assert not run.captions.exists() and not run.rejects.exists()
    assert survey(run)[1].done == 5


def test_rows_of_a_torn_file_are_missing(run: CaptionRun) -> None:
    torn = run.outcomes / "0001" / "m.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(UserError, match="1 images have no outcome yet \\('c'"):
        compact(run)


def test_an_outcome_under_another_id_than_its_manifest_row_is_never_written(run: CaptionRun) -> None:
    commit(run, 2, "x", caption(run, "a") | {"id": "somebody else"})
    with pytest.raises(AssertionError, match="another id"):
        compact(run)
    assert not run.captions.exists()


def test_copies_of_a_repeated_write_are_dropped_and_counted(run: CaptionRun) -> None:
    commit(run, 1, "n", caption(run, "e"), caption(run, "d"), reject(run, "b"))
    counts = compact(run)
    assert (counts.rows, counts.captions, counts.rejects, counts.duplicates_dropped) == (5, 4, 1, 2)
    assert _ids(run, "captions") == ["c", "a", "d", "e"] and _ids(run, "rejects") == ["b"]


def test_captioned_images_with_equal_bytes_are_counted(run: CaptionRun) -> None:
    digests = {"a": "1" * 64, "d": "2" * 64, "e": "1" * 64}
    commit(run, 2, "x", *(caption(run, key) | {"image_sha256": digest} for key, digest in digests.items()))
    commit(run, 2, "y", reject(run, "b"))
    assert compact(run).duplicates == 1


def test_a_caption_wins_over_a_reject_before_or_after_it(run: CaptionRun) -> None:
    commit(run, 2, "x", caption(run, "b"), reject(run, "a"))
    counts = compact(run)
    assert _ids(run, "rejects") == [] and len(_ids(run, "captions")) == 5
    assert counts.duplicates_dropped == 0


def test_of_two_rejects_the_later_one_stays(run: CaptionRun) -> None:
    commit(run, 2, "x", reject(run, "b", "truncated", attempt=1))
    compact(run)
    assert [(row["reason"], row["attempt"]) for row in _rows(run, "rejects")] == [("truncated", 1)]


def test_a_retry_after_the_finish_moves_a_reject_to_the_captions(run: CaptionRun) -> None:
    compact(run)
    before = _rows(run, "captions")
    commit(run, 2, "x", caption(run, "b", "Mended."))
    counts = compact(run)
    assert _ids(run, "captions") == ["c", "a", "d", "b", "e"] and _ids(run, "rejects") == []
    assert [row for row in _rows(run, "captions") if row["id"] != "b"] == before
    assert (counts.captions, counts.duplicates_dropped) == (5, 0)


def test_new_shards_join_a_finished_run(run: CaptionRun) -> None:
    compact(run)
    add_shard(run, ["f", "g"])
    commit(run, 2, "x", caption(run, "g"), reject(run, "f", "empty"))
    counts = compact(run)
    assert _ids(run, "captions") == ["c", "a", "d", "e", "g"] and _ids(run, "rejects") == ["b", "f"]
    assert counts.by_reason == {"missing": 1, "empty": 1}


def test_a_refused_caption_is_kept_and_not_counted_as_one(run: CaptionRun) -> None:
    commit(run, 2, "x", reject(run, "b", "refusal", caption="I cannot see it.") | {"stage": "gate"})
    for counts in (compact(run), compact(run)):  # from a session's file, then from its own output
        assert [row["caption"] for row in _rows(run, "rejects")] == ["I cannot see it."]
        assert sum(len(lengths) for lengths in counts.lengths) == counts.captions == 4


def test_a_finished_run_compacts_to_itself(run: CaptionRun) -> None:
    compact(run)
    before = _settled(run)
    counts = compact(run)
    assert _settled(run) == before and counts.rows == 5


FACTS = {"root": "/images", "model": "m@1", "engine": "fake", "prompt_id": "p@1", "prompt_text": "Describe."}


def _session(run: CaptionRun, started: float) -> int:
    return int(begin_session(run, started).name)


@pytest.fixture
def timed(tmp_path: Path) -> CaptionRun:
    """Two sessions of 10 and 6 seconds, an hour apart; the first one was killed."""
    run = begin(tmp_path / "timed", ["a", "b", "c", "d"])
    first = _session(run, 1_000.0)
    commit(run, first, "x", caption(run, "a", "Ten chars."), time=1_004.0)
    commit(run, first, "y", reject(run, "b"), time=1_010.0)
    second = _session(run, 4_600.0)
    commit(
        run, second, "z", caption(run, "c", "Twenty characters ü!"), reject(run, "d", "bomb"), time=4_606.0
    )
    return run


def _finish(run: CaptionRun) -> dict[str, Any]:
    committed = commits(run)
    return summarise(run, compact(run), committed, FACTS, started=time.time())


def test_the_summary_counts_by_source_and_reason(timed: CaptionRun) -> None:
    summary = _finish(timed)
    assert summary == json.loads((timed.path / "summary.json").read_text())
    assert {key: summary[key] for key in ("rows", "captions", "rejects", "tokens", "reject_rate")} == {
        "rows": 4,
        "captions": 2,
        "rejects": 2,
        "tokens": 14,
        "reject_rate": 0.5,
    }
    assert summary["by_source"] == {"coco": {"captions": 2, "rejects": 2}}
    assert summary["by_reason"] == {"missing": 1, "bomb": 1}
    assert summary["caption_characters"] == {"mean": 15.0, "median": 15.0, "p95": 19.5}
    assert {key: summary[key] for key in FACTS} == FACTS


def test_the_wall_time_leaves_out_the_hours_between_sessions(timed: CaptionRun) -> None:
    summary = _finish(timed)
    assert (summary["wall_seconds"], summary["sessions"]) == (16.0, 2)
    assert summary["started"] == "1970-01-01T00:16:40+00:00"
    assert summary["commits"] == [
        {"time": 1_004.0, "rows": 1, "session": 0},
        {"time": 1_010.0, "rows": 1, "session": 0},
        {"time": 4_606.0, "rows": 2, "session": 1},
    ]


def test_times_are_closed_once_the_report_is_written(
    timed: CaptionRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that finishes is the second session, whose last commit came after 6 s."""
    committed = commits(timed)
    monkeypatch.setattr(time, "time", lambda: 4_607.0)
    summary = summarise(timed, compact(timed), committed, FACTS, started=4_600.0)
    assert (summary["seconds"], summary["wall_seconds"]) == (7.0, 17.0)
    monkeypatch.setattr(time, "time", lambda: 4_609.5)
    summary = close_times(timed, summary, started=4_600.0)
    assert (summary["seconds"], summary["wall_seconds"], summary["startup_seconds"]) == (9.5, 19.5, 6.0)
    assert summary == json.loads(timed.summary.read_text())
    monkeypatch.undo()
    assert _finish(timed)["wall_seconds"] == 19.5  # its end is known now, whatever comes later


def test_a_session_without_a_commit_adds_no_time(timed: CaptionRun) -> None:
    _session(timed, 9_000.0)
    summary = _finish(timed)
    assert (summary["wall_seconds"], summary["sessions"]) == (16.0, 3)


def test_engines_of_all_sessions_that_ended_count_together(timed: CaptionRun) -> None:
    assert _finish(timed)["engine_statistics"] is None
    for live in (30, 10):
        stats = EngineStats(
            requests=4,
            prompt_tokens=100,
            new_tokens=live,
            prefill_seconds=2.0,
            decode_seconds=0.5,
            slot_steps=40,
            live_steps=live,
            begun=4,
            ttft_seconds=6.0,
        )
        note_engines(timed, _session(timed, 9_000.0), stats)
    _session(timed, 9_000.0)  # killed
    assert _finish(timed)["engine_statistics"] == {
        "requests": 8,
        "prompt_tokens": 200,
        "new_tokens": 40,
        "slot_use": 0.5,
        "prefill_tokens_per_second": 50.0,
        "decode_tokens_per_second": 40.0,
        "seconds_to_first_token": 1.5,
    }


def test_times_of_a_finished_run_stay_when_more_is_done_later(timed: CaptionRun) -> None:
    _finish(timed)
    third = _session(timed, 9_000.0)
    commit(timed, third, "w", caption(timed, "b"), time=9_002.0)
    summary = _finish(timed)
    assert (summary["wall_seconds"], summary["sessions"], len(summary["commits"])) == (18.0, 3, 4)
    assert summary["captions"] == 3


@pytest.mark.parametrize("killed", ["before compact", "after compact"])
def test_a_kill_in_the_finish_step_loses_no_time_and_counts_none_twice(
    timed: CaptionRun, killed: str
) -> None:
    commits(timed)
    if killed == "after compact":
        compact(timed)
        assert not timed.outcomes.exists()
    summary = _finish(timed)
    assert (summary["wall_seconds"], len(summary["commits"])) == (16.0, 3)


def test_a_run_of_rejects_alone_has_a_summary(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", ["a"])
    commit(run, _session(run, 0.0), "x", reject(run, "a"), time=2.0)
    summary = _finish(run)
    assert summary["caption_characters"] == {"mean": 0.0, "median": 0.0, "p95": 0.0}
    assert (summary["captions"], summary["reject_rate"], summary["tokens"]) == (0, 1.0, 0)


def test_the_work_folder_may_be_cleaned_away_after_a_finish(timed: CaptionRun) -> None:
    _finish(timed)
    shutil.rmtree(timed.path / "work")
    timed.pending.mkdir(parents=True)  # as write_pending leaves it
    assert survey(timed)[1].done == 4


def test_a_finished_run_whose_working_folder_was_removed_is_summarised_again(timed: CaptionRun) -> None:
    _finish(timed)
    shutil.rmtree(timed.path / "work")
    timed.pending.mkdir(parents=True)  # as write_pending leaves it
    summary = _finish(timed)
    assert (summary["captions"], summary["rejects"], summary["sessions"]) == (2, 2, 0)
