"""What a run says of its time: start-up, work and finish apart, in one session or several."""

import time
from pathlib import Path
from typing import Any

import pytest

from sharegpt4v.captions.sessions import Commit, read_sessions, session, session_times, thinned
from tests.captions.sessions import begin

NOW = 1_100.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def _session(number: int, started: float, **more: Any) -> dict[str, Any]:
    return {"number": number, "started": started, **more}


def _commits(number: int, *moments: tuple[float, int]) -> list[Commit]:
    return [Commit(time=moment, rows=rows, session=number) for moment, rows in moments]


def test_the_rate_leaves_out_start_up_and_finish() -> None:
    committed = _commits(0, (1_010.0, 32), (1_012.0, 64), (1_014.0, 64))
    assert session_times([_session(0, 1_000.0)], committed, started=1_000.0) == {
        "seconds": 100.0,
        "startup_seconds": 10.0,
        "wall_seconds": 100.0,
        "images_per_second": 32.0,
    }


def test_a_session_of_one_commit_has_a_start_up_and_no_rate() -> None:
    times = session_times([_session(0, 1_000.0)], _commits(0, (1_010.0, 8)), started=1_000.0)
    assert (times["startup_seconds"], times["images_per_second"]) == (10.0, 0.0)


def test_all_sessions_count_a_killed_one_until_its_last_commit() -> None:
    sessions = [
        _session(0, 100.0),  # killed before it committed anything
        _session(1, 200.0),  # killed
        _session(2, 300.0, ended=330.0),  # interrupted
        _session(3, 400.0, ended=405.0),  # interrupted before its first commit
        _session(4, 1_000.0),
    ]
    committed = [
        *_commits(1, (210.0, 10), (214.0, 10)),
        *_commits(2, (311.0, 10), (317.0, 40)),
        *_commits(4, (1_020.0, 10)),
    ]
    times = session_times(sessions, committed, started=1_000.0)
    assert times["wall_seconds"] == 14 + 30 + 5 + 100
    assert (times["seconds"], times["startup_seconds"]) == (100.0, 20.0)
    assert times["images_per_second"] == 50 / 10


def test_a_command_that_only_finishes_has_its_own_time_and_no_start_up() -> None:
    times = session_times([_session(0, 900.0)], _commits(0, (950.0, 8)), started=1_090.0)
    assert times == {
        "seconds": 10.0,
        "startup_seconds": None,
        "wall_seconds": 50.0,
        "images_per_second": 0.0,
    }


def test_a_clock_of_the_storage_that_is_behind_gives_no_negative_time() -> None:
    times = session_times([_session(0, 1_000.0)], _commits(0, (998.0, 8)), started=1_000.0)
    assert times["startup_seconds"] == 0.0


def test_the_end_of_a_session_is_noted_however_it_ends(tmp_path: Path) -> None:
    run = begin(tmp_path, ["a"])
    with session(run, 1_000.0) as first:
        assert first.is_dir()
    with pytest.raises(KeyboardInterrupt), session(run, 1_050.0):
        raise KeyboardInterrupt
    assert read_sessions(run) == [_session(0, 1_000.0, ended=NOW), _session(1, 1_050.0, ended=NOW)]


def test_many_commits_are_added_up_and_all_times_and_rates_stay() -> None:
    first, second = [(100.0 + n / 7, 64) for n in range(9_000)], [(5_000.0 + n, 64) for n in range(500)]
    committed = [*_commits(0, *first), *_commits(1, *second), *_commits(2, (9_000.0, 5))]
    shown = thinned(committed)
    assert 390 < len(shown) <= 410
    assert sum(commit["rows"] for commit in shown) == 9_500 * 64 + 5
    sessions = [_session(0, 90.0), _session(1, 4_990.0), _session(2, 8_990.0)]
    for started in (90.0, 8_990.0):
        assert session_times(sessions, shown, started) == session_times(sessions, committed, started)


def test_few_commits_stay_as_they_are() -> None:
    committed = [*_commits(0, (1.0, 2), (2.0, 3)), *_commits(1, (3.0, 1))]
    assert thinned(committed) == committed
