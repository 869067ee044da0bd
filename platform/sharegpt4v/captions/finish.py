"""The finish step: audit what the sessions wrote, compact it, and only then call the run a success.

Parts are compacted shard by shard beside their final place and moved there together, behind a marker that
lets an interrupted move roll forward.
"""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sharegpt4v.atomic import make_folder, publish, sync, write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.notes import read_note
from sharegpt4v.captions.outcomes import outcome_files, read_outcomes, session_of, set_aside
from sharegpt4v.captions.retry import end_retry
from sharegpt4v.captions.sessions import Commit, note_end, read_sessions, session_times, thinned
from sharegpt4v.captions.settle import Counts, settled_shards, write_parts
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.errors import UserError

_MARKER = "_COMPLETE"

_COUNTED = ("rows", "captions", "rejects", "tokens", "duplicates", "duplicates_dropped", "by_source")
"""What summary.json takes from Counts as it is."""


def commits(run: CaptionRun) -> list[Commit]:
    """Returns when each file of outcomes was committed, in any session, and its rows; in time order.

    Kept as work/commits.json, too: compacting removes the files, and a kill may follow at once.
    """
    path = run.path / "work" / "commits.json"
    known: dict[str, Commit] = read_note(path) or {}
    for file in outcome_files(run):
        table = read_outcomes(file, ["row"])
        if table is not None:
            name = str(file.relative_to(run.outcomes))
            moment, number = file.stat().st_mtime, session_of(run, file)
            known[name] = Commit(time=moment, rows=len(table), session=number)
    write_atomic(path, json.dumps(known))
    return sorted(known.values(), key=lambda commit: commit["time"])


def roll_forward(run: CaptionRun) -> None:
    """Completes a move into place that a kill interrupted. Does nothing when there is none."""
    compacted = run.path / "work" / "compacted"
    if not (compacted / _MARKER).exists():
        shutil.rmtree(compacted, ignore_errors=True)
        return
    for final in (run.captions, run.rejects):
        fresh = compacted / final.name
        if fresh.exists():
            shutil.rmtree(final, ignore_errors=True)
            publish(fresh, final)
    shutil.rmtree(run.outcomes, ignore_errors=True)
    shutil.rmtree(run.pending, ignore_errors=True)
    end_retry(run)
    shutil.rmtree(compacted)


def finished_parts(run: CaptionRun) -> tuple[Path, Path]:
    """Returns where captions/ and rejects/ lie, for readers that must leave an interrupted move as it is."""
    compacted = run.path / "work" / "compacted"
    if not (compacted / _MARKER).exists():
        return run.captions, run.rejects
    fresh = [compacted / final.name for final in (run.captions, run.rejects)]
    return (
        fresh[0] if fresh[0].exists() else run.captions,
        fresh[1] if fresh[1].exists() else run.rejects,
    )


def compact(run: CaptionRun) -> Counts:
    """Writes captions/ and rejects/ from all sessions, auditing each manifest shard on the way.

    Every manifest id ends in exactly one of the two. Raises UserError when ids are missing, naming the first,
    and for damaged files of outcomes, which it sets aside: a rerun mends both.
    """
    compacted = run.path / "work" / "compacted"
    shutil.rmtree(compacted, ignore_errors=True)
    for final in (run.captions, run.rejects):
        make_folder(compacted / final.name)
    counts, rows, missing, unreadable = Counts(), 0, [], set[Path]()
    for shard in settled_shards(run, run.captions, run.rejects):
        rows += shard.rows
        missing += shard.missing
        unreadable |= set(shard.unreadable)
        counts.add(shard)
        write_parts(shard, compacted / run.captions.name, compacted / run.rejects.name)
    if unreadable:
        set_aside(unreadable)
        raise UserError(
            f"{len(unreadable)} files of outcomes are damaged and were set aside "
            f"({min(unreadable).relative_to(run.path)}, ...): run the same command again to redo their images"
        )
    if missing:
        raise UserError(
            f"{rows - counts.rows} images have no outcome yet "
            f"({', '.join(map(repr, missing[:3]))}, ...): run the same command again"
        )
    sync(compacted)  # the marker states that the parts are complete; outcomes are deleted once it exists
    write_atomic(compacted / _MARKER, "")
    roll_forward(run)
    return counts


def summarise(
    run: CaptionRun, counts: Counts, committed: list[Commit], facts: dict[str, Any], started: float
) -> dict[str, Any]:
    """Writes and returns summary.json: counts by source and reason, rates, times, commits.

    committed: what commits() gave before compact(). started: unix time at which this command began.
    session_times() says what the times mean.
    """
    sessions = read_sessions(run)
    lengths = np.concatenate(counts.lengths) if counts.lengths else np.zeros(0)
    summary = {
        **{name: getattr(counts, name) for name in _COUNTED},
        "by_reason": dict(counts.by_reason.most_common()),
        "reject_rate": counts.rejects / max(1, counts.rows),
        **session_times(sessions, committed, started),
        "sessions": len(sessions),
        **facts,
        "engine_statistics": _engine_statistics(sessions),
        # A finished run whose work/ was removed has no record of its sessions.
        "started": _iso(sessions[0]["started"] if sessions else started),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "caption_characters": {
            "mean": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
            "median": float(np.median(lengths)) if len(lengths) else 0.0,
            "p95": float(np.percentile(lengths, 95)) if len(lengths) else 0.0,
        },
        "commits": thinned(committed),
    }
    _write_summary(run, summary)
    return summary


def close_times(run: CaptionRun, summary: dict[str, Any], started: float) -> dict[str, Any]:
    """Writes and returns the summary with the times up to now: a command ends after its report is written."""
    sessions = read_sessions(run)
    if sessions and sessions[-1]["started"] == started:
        note_end(run, sessions[-1]["number"])
    summary = summary | session_times(sessions, summary["commits"], started)
    _write_summary(run, summary)
    return summary


def _write_summary(run: CaptionRun, summary: dict[str, Any]) -> None:
    write_atomic(run.summary, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _engine_statistics(sessions: list[dict[str, Any]]) -> dict[str, float] | None:
    """Sums up all sessions that were not killed; None when no engine with slots was among them.

    requests: the answers that these figures are about, retries included. Rates are those of one engine while
    it is inside the model, times are means.
    """
    total = EngineStats()
    for session in sessions:
        total += EngineStats(**session.get("engines", {}))
    if not total.slot_steps:
        return None
    return {
        "requests": total.requests,
        "prompt_tokens": total.prompt_tokens,
        "new_tokens": total.new_tokens,
        "slot_use": round(total.slot_use, 4),
        "prefill_tokens_per_second": round(total.prefill_rate, 1),
        "decode_tokens_per_second": round(total.decode_rate, 1),
        "seconds_to_first_token": round(total.mean_ttft, 3),
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
