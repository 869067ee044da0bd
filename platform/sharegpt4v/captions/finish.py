"""The finish step: audit what the sessions wrote, compact it, and only then call the run a success.

Parts are compacted shard by shard beside their final place and moved there together, behind a marker that
lets an interrupted move roll forward.
"""

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sharegpt4v.atomic import publish, sync, write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import outcome_files
from sharegpt4v.captions.settle import Counts, settled_shards, write_parts
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.errors import UserError

_MARKER = "_COMPLETE"


def commits(run: CaptionRun) -> list[dict[str, float]]:
    """When each file of outcomes was committed, in any session, and its rows; in time order.

    Kept in work/commits.json as well: compacting removes the files, and a kill may follow at once.
    """
    path = run.path / "work" / "commits.json"
    known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for file in outcome_files(run):
        name = str(file.relative_to(run.outcomes))
        known[name] = {"time": file.stat().st_mtime, "rows": pq.read_metadata(file).num_rows}
    write_atomic(path, json.dumps(known))
    return sorted(known.values(), key=lambda commit: commit["time"])


def roll_forward(run: CaptionRun) -> None:
    """Ends a move into place that a kill interrupted. Harmless when there is none."""
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

    Every manifest id ends in exactly one of the two. Raises UserError when ids are missing, which a rerun
    mends, naming the first.
    """
    compacted = run.path / "work" / "compacted"
    shutil.rmtree(compacted, ignore_errors=True)
    for final in (run.captions, run.rejects):
        (compacted / final.name).mkdir(parents=True)
    counts, rows, missing = Counts(), 0, []
    for shard in settled_shards(run, run.captions, run.rejects):
        rows += shard.rows
        missing += shard.missing
        counts.add(shard)
        write_parts(shard, compacted / run.captions.name, compacted / run.rejects.name)
    if missing:
        raise UserError(
            f"{rows - counts.rows} images have no outcome yet "
            f"({', '.join(map(repr, missing[:3]))}, ...): run the same command again"
        )
    sync(compacted)  # the marker vouches for the parts, and the outcomes go when it is there
    write_atomic(compacted / _MARKER, "")
    roll_forward(run)
    return counts


def summarise(
    run: CaptionRun, counts: Counts, committed: list[dict[str, float]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes and returns summary.json: counts by source and reason, rates, wall time, commits.

    committed: what commits() gave before compact().
    """
    sessions = [json.loads(path.read_text()) for path in sorted(run.sessions.glob("*.json"))]
    wall = _wall_seconds([session["started"] for session in sessions], committed)
    fresh = sum(int(commit["rows"]) for commit in committed)
    lengths = np.concatenate(counts.lengths) if counts.lengths else np.zeros(0)
    summary = {
        **{k: v for k, v in asdict(counts).items() if k != "lengths"},
        "by_reason": dict(counts.by_reason.most_common()),
        "reject_rate": counts.rejects / max(1, counts.rows),
        "wall_seconds": round(wall, 3),
        "sessions": len(sessions),
        "images_per_second": round(fresh / wall, 3) if wall else 0.0,
        **facts,
        "engine_statistics": _engine_statistics(sessions),
        # No session is known of a finished run whose work/ was removed.
        "started": _iso(sessions[0]["started"] if sessions else datetime.now(UTC).timestamp()),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "caption_characters": {
            "mean": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
            "median": float(np.median(lengths)) if len(lengths) else 0.0,
            "p95": float(np.percentile(lengths, 95)) if len(lengths) else 0.0,
        },
        "commits": committed,
    }
    write_atomic(run.path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _engine_statistics(sessions: list[dict[str, Any]]) -> dict[str, float] | None:
    """Of all sessions that were not killed; None when no engine with slots was among them.

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


def _wall_seconds(starts: list[float], committed: list[dict[str, float]]) -> float:
    """Sum over sessions from start to last commit: a killed session has no other end."""
    times = np.array([commit["time"] for commit in committed])
    ends = [*starts[1:], float("inf")][: len(starts)]
    last = [times[(times >= a) & (times < b)] for a, b in zip(starts, ends, strict=True)]
    return sum(float(inside.max()) - start for start, inside in zip(starts, last, strict=True) if len(inside))
