"""Sessions of a captioning run: when each command began and ended, and what its engines did."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from sharegpt4v.atomic import make_folder, write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.notes import read_note
from sharegpt4v.engine.stats import EngineStats


class Commit(TypedDict):
    """time: unix seconds at which a file of outcomes was committed. rows: its images. session: its number."""

    time: float
    rows: int
    session: int


SHOWN = 400
"""Commits in summary.json, beside one or two more a session; a million images have 20,000."""


def next_session(run: CaptionRun) -> int:
    """Returns the number of the session that begins next: one more than any before had."""
    return 1 + max((int(p.stem) for p in run.sessions.glob("*.json") if p.stem.isdecimal()), default=-1)


def begin_session(run: CaptionRun, started: float) -> Path:
    """Makes the folder of a new session's outcomes, numbered after all earlier ones, and notes its start.

    started: unix time at which its command began.
    """
    make_folder(run.sessions)
    number = next_session(run)
    write_atomic(run.sessions / f"{number:04}.json", json.dumps({"number": number, "started": started}))
    outcomes = run.outcomes / f"{number:04}"
    make_folder(outcomes)
    return outcomes


@contextmanager
def session(run: CaptionRun, started: float) -> Iterator[Path]:
    """Begins a session and notes its end however the block ends; a killed one has no end."""
    outcomes = begin_session(run, started)
    try:
        yield outcomes
    finally:
        with suppress(OSError):  # usually a full disk, which the block itself reports as its error
            note_end(run, int(outcomes.name))


def note_end(run: CaptionRun, number: int) -> None:
    """Notes that a session has lasted until now."""
    _note(run, number, {"ended": time.time()})


def note_engines(run: CaptionRun, number: int, engines: EngineStats) -> None:
    """Adds what its engines did to a session."""
    _note(run, number, {"engines": asdict(engines)})


def _note(run: CaptionRun, number: int, facts: dict[str, Any]) -> None:
    path = run.sessions / f"{number:04}.json"
    known = read_note(path)
    if known is not None:
        write_atomic(path, json.dumps(known | facts))


def read_sessions(run: CaptionRun) -> list[dict[str, Any]]:
    """Reads all sessions in order: number, started, ended (unless killed) and engines (where noted).

    Leaves out damaged ones: without their times the run can still be finished.
    """
    notes = (read_note(path) for path in sorted(run.sessions.glob("*.json")))
    return [note for note in notes if note is not None and {"number", "started"} <= note.keys()]


def session_times(
    sessions: Sequence[dict[str, Any]], committed: Sequence[Commit], started: float
) -> dict[str, float | None]:
    """Returns the times of a run, as summary.json has them, rounded to milliseconds.

    seconds: of the present command, which began at unix time `started`, until now.
    startup_seconds: of these, until its first commit; None when it committed nothing.
    wall_seconds: of all sessions together, a killed one until its last commit.
    images_per_second: from the first commit of each session to its last, without start-up and finish; 0 where
        no session had a second commit.
    """
    now, wall, startup = time.time(), 0.0, None
    parts: defaultdict[int, list[Commit]] = defaultdict(list)
    for commit in committed:
        parts[commit["session"]].append(commit)
    for session in sessions:
        times = [commit["time"] for commit in parts[session["number"]]]
        end = now if session["started"] == started else session.get("ended", max(times, default=0.0))
        wall += max(0.0, end - session["started"])
        if session["started"] == started and times:
            startup = round(max(0.0, min(times) - started), 3)
    return {
        "seconds": round(now - started, 3),
        "startup_seconds": startup,
        "wall_seconds": round(wall, 3),
        "images_per_second": round(_steady_rate(list(parts.values())), 3),
    }


def thinned(committed: Sequence[Commit]) -> list[Commit]:
    """Returns commits with neighbours added up, about SHOWN of them; first and last times of sessions stay.

    committed: in time order. What session_times() makes of both is the same.
    """
    parts: defaultdict[int, list[Commit]] = defaultdict(list)
    for commit in committed:
        parts[commit["session"]].append(commit)
    step = -(-len(committed) // SHOWN)
    shown: list[Commit] = []
    for first, *others in parts.values():
        shown.append(first)
        for start in range(0, len(others), step):
            group = others[start : start + step]
            shown.append(group[-1] | {"rows": sum(commit["rows"] for commit in group)})
    return sorted(shown, key=lambda commit: commit["time"])


def _steady_rate(parts: Sequence[Sequence[Commit]]) -> float:
    rows = seconds = 0.0
    for part in filter(None, parts):
        first, *others = sorted(part, key=lambda commit: commit["time"])
        if others:
            rows += sum(commit["rows"] for commit in others)
            seconds += others[-1]["time"] - first["time"]
    return rows / seconds if seconds else 0.0
