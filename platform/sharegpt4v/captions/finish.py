"""The finish step: audit what the sessions wrote, compact it, and only then call the run a success.

Parts are compacted shard by shard beside their final place and moved there together, behind a marker that
lets an interrupted move roll forward. Memory holds one manifest shard at a time.
"""

import json
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharegpt4v.atomic import publish, sync, write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import outcome_files
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.errors import UserError
from sharegpt4v.records import CAPTIONS, OUTCOME, OUTCOMES, REJECTS

_MARKER = "_COMPLETE"


@dataclass(slots=True)
class Counts:
    """What the audit counted; the ground of summary.json."""

    rows: int = 0
    captions: int = 0
    rejects: int = 0
    tokens: int = 0
    duplicates_dropped: int = 0
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    by_reason: Counter[str] = field(default_factory=Counter)
    lengths: list[Any] = field(default_factory=list)  # arrays of characters a caption


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


def compact(run: CaptionRun) -> Counts:
    """Writes captions/ and rejects/ from all sessions, auditing each manifest shard on the way.

    Every manifest id ends in exactly one of the two. Raises UserError when ids are missing, which a rerun
    mends, naming the first.
    """
    compacted = run.path / "work" / "compacted"
    shutil.rmtree(compacted, ignore_errors=True)
    for final in (run.captions, run.rejects):
        (compacted / final.name).mkdir(parents=True)
    files = _files_by_shard(run)
    counts, missing = Counts(), []
    for number, path in enumerate(run.shards()):
        ids = pq.read_table(path, columns=["id"])["id"].combine_chunks()
        table, dropped = _settled(_shard_rows(run, path, number, ids, files[number]))
        absent = np.setdiff1d(np.arange(len(ids)), table["row"].to_numpy())
        missing += [ids[int(row)].as_py() for row in absent[:3]]
        wrong = pc.any(pc.not_equal(table["id"], ids.take(table["row"].combine_chunks()))).as_py()
        assert not wrong, f"an outcome of {path.name} carries another id than its manifest row"
        counts.duplicates_dropped += dropped
        _count(counts, table)
        for outcome, schema, final in (("caption", CAPTIONS, run.captions), ("reject", REJECTS, run.rejects)):
            part = table.filter(pc.equal(table[OUTCOME], outcome)).select(schema.names).cast(schema)
            pq.write_table(part, compacted / final.name / path.name)
    if missing:
        raise UserError(
            f"{_manifest_rows(run) - counts.rows} images have no outcome yet "
            f"({', '.join(map(repr, missing[:3]))}, ...): run the same command again"
        )
    sync(compacted)  # the marker vouches for the parts, and the outcomes go when it is there
    write_atomic(compacted / _MARKER, "")
    roll_forward(run)
    return counts


def _manifest_rows(run: CaptionRun) -> int:
    return sum(int(pq.read_metadata(path).num_rows) for path in run.shards())


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
    known = {field.name for field in fields(EngineStats)}
    total = EngineStats()
    for session in sessions:
        counts = session.get("engines", {})
        total += EngineStats(**{name: count for name, count in counts.items() if name in known})
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


def _files_by_shard(run: CaptionRun) -> defaultdict[int, list[Path]]:
    files: defaultdict[int, list[Path]] = defaultdict(list)
    for path in outcome_files(run):
        for number in pc.unique(pq.read_table(path, columns=["shard"])["shard"]).to_pylist():
            files[number].append(path)
    return files


def _shard_rows(run: CaptionRun, path: Path, number: int, ids: pa.Array, files: list[Path]) -> pa.Table:
    """All rows known of one shard, the oldest first: finished parts, then the sessions' files."""
    tables = []
    for outcome, final in (("caption", run.captions), ("reject", run.rejects)):
        if (final / path.name).exists():
            tables.append(_as_outcomes(pq.read_table(final / path.name), outcome, number, ids))
    for file in files:
        table = pq.read_table(file)
        tables.append(table.filter(pc.equal(table["shard"], number)).select(OUTCOMES.names).cast(OUTCOMES))
    return pa.concat_tables(tables) if tables else OUTCOMES.empty_table()


def _as_outcomes(part: pa.Table, outcome: str, number: int, ids: pa.Array) -> pa.Table:
    length = len(part)
    known = {
        OUTCOME: pa.array([outcome] * length, pa.string()),
        "shard": pa.array([number] * length, pa.int32()),
        "row": pc.index_in(part["id"], value_set=ids).cast(pa.int32()),
    }
    columns = [
        known[name] if name in known else part[name] if name in part.column_names else pa.nulls(length, kind)
        for name, kind in zip(OUTCOMES.names, OUTCOMES.types, strict=True)
    ]
    return pa.table(columns, schema=OUTCOMES)


def _settled(table: pa.Table) -> tuple[pa.Table, int]:
    """One row for each manifest row, in its order: a caption wins over a reject, then the later one.

    Extra copies come from a retry of rejects, or from a session that went on writing while another held its
    lock; only the second kind is counted.
    """
    order = np.lexsort(
        (
            -np.arange(len(table)),
            np.asarray(pc.equal(table[OUTCOME], "reject").to_numpy()),
            table["row"].to_numpy(),
        )
    )
    rows = table["row"].to_numpy()[order]
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = rows[1:] != rows[:-1]
    kept = table.take(pa.array(order[first]))
    rejects = np.asarray(pc.equal(table[OUTCOME], "reject").to_numpy())[order]
    return kept, int((~first & ~rejects).sum())


def _count(counts: Counts, table: pa.Table) -> None:
    counts.rows += len(table)
    captions = table.filter(pc.equal(table[OUTCOME], "caption"))
    counts.captions += len(captions)
    counts.rejects += len(table) - len(captions)
    counts.tokens += pc.sum(captions["tokens"]).as_py() or 0
    counts.lengths.append(pc.utf8_length(captions["caption"]).to_numpy())
    groups = table.group_by(["source", OUTCOME]).aggregate([([], "count_all")])
    for source, outcome, count in zip(*(column.to_pylist() for column in groups.columns), strict=True):
        entry = counts.by_source.setdefault(source, {"captions": 0, "rejects": 0})
        entry[f"{outcome}s"] += count
    for reason in pc.value_counts(table["reason"].combine_chunks().drop_null()).to_pylist():
        counts.by_reason[reason["values"]] += reason["counts"]
