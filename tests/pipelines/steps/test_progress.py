"""What a waiting person reads: phases until the first image, then images and their steady rate."""

import io
import itertools
import re
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipelines.steps import phases as phases_module
from pipelines.steps import progress
from pipelines.steps.ledger import Tally
from pipelines.steps.phases import Phases
from pipelines.steps.progress import ProgressBar


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)


def _watched(tallies: list[Tally], phases: Phases, total: int = 100, done: int = 0) -> None:
    """A session that lasts until each of these tallies was seen, and the last one twice more."""
    polls, seen = 0, threading.Event()

    def tally() -> Tally:
        nonlocal polls
        polls += 1
        if polls > len(tallies) + 2:
            seen.set()
        return tallies[min(polls, len(tallies)) - 1]

    with ProgressBar("captioned", tally, total, done, phases, "first caption"):
        assert seen.wait(30)


def _texts(err: str) -> list[str]:
    """The lines without their times, repeated ones once."""
    lines = [re.sub(r"^ *[\d.]+ s  ", "", line) for line in err.splitlines()]
    return list(dict.fromkeys(lines))


def test_no_line_counts_images_before_the_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases(time.time())
    phases.begin("loading toy on 2 workers")
    _watched([Tally(), Tally(), Tally(ready=1), Tally(ready=2)], phases)
    assert _texts(capsys.readouterr().err) == ["loading toy on 2 workers", "first caption"]


def test_every_line_says_how_old_the_command_is(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases(time.time() - 12.34)
    phases.begin("reading photos")
    phases.say("passed over: 1 .txt files")
    assert capsys.readouterr().err == " 12.3 s  reading photos\n 12.3 s  passed over: 1 .txt files\n"


def test_the_rate_counts_from_the_first_images_and_earlier_sessions_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(0.0, 2.0)  # two between two polls
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    _watched([Tally(10), Tally(10), Tally(30, {"empty": 2})], Phases(0.0), total=1_000, done=500)
    lines = _texts(capsys.readouterr().err)
    assert lines[:3] == [
        "captioned 510 of 1,000",
        "captioned 532 of 1,000, 5.5 images/s, about 85 s left, 2 rejected",
        "captioned 532 of 1,000, 3.7 images/s, about 128 s left, 2 rejected",
    ]


def test_a_run_that_is_done_when_it_is_first_seen_has_no_rate_and_no_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _watched([Tally(100)], Phases(0.0))
    assert _texts(capsys.readouterr().err) == ["captioned 100 of 100"]


def test_a_terminal_shows_the_phase_with_a_spinner_and_keeps_one_line_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(phases_module, "Console", lambda **_: terminal)
    with Phases(time.time()) as phases:
        phases.begin("starting Ray")
        time.sleep(0.3)
        phases.end()
        assert "starting Ray, 0 s" in shown.getvalue()
        assert capsys.readouterr().err == "  0.0 s  starting Ray\n"
        phases.begin("reading photos")
        phases.say("passed over: 1 .txt files")
        phases.say("200 images")
    printed = re.findall(r"\d s  ([^\n\x1b,]+)\n", shown.getvalue())  # the spinner's frames hold a comma
    assert printed == ["reading photos", "passed over: 1 .txt files", "200 images"]
    assert capsys.readouterr().err == ""
