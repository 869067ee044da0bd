"""Sessions of a captioning run: when each began, and what its engines did."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.engine.stats import EngineStats


def begin_session(run: CaptionRun) -> Path:
    """A folder for this session's outcomes, numbered after all earlier ones, and its start time."""
    run.sessions.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.stem) for p in run.sessions.glob("*.json")), default=-1)
    write_atomic(run.sessions / f"{number:04}.json", json.dumps({"started": datetime.now(UTC).timestamp()}))
    outcomes = run.outcomes / f"{number:04}"
    outcomes.mkdir(parents=True)
    return outcomes


def end_session(run: CaptionRun, outcomes: Path, engines: EngineStats) -> None:
    """Adds what its engines did to the session of `outcomes`; one that was killed has no such entry."""
    path = run.sessions / f"{outcomes.name}.json"
    write_atomic(path, json.dumps(json.loads(path.read_text()) | {"engines": asdict(engines)}))
