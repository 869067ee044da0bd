"""What a run has already done, and what is still to do.

Done is what finished parts (captions/, rejects/) or undamaged files of work/outcomes hold. The result
is one bit per manifest row.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import SET_ASIDE, outcome_files, read_outcomes, session_of
from sharegpt4v.captions.parts import read_part
from sharegpt4v.records import OUTCOME

Done = list[npt.NDArray[np.bool_]]
"""For each manifest shard one flag per row."""

ALL_REASONS = "all"


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Rows of the manifest, and how many of them already have an outcome of each kind.

    reasons: rejects by reason, those to be tried again included. unreadable: files of outcomes that count for
    nothing, since their content is damaged.
    """

    rows: int
    captions: int
    rejects: int
    reasons: Mapping[str, int] = field(default_factory=dict, compare=False)
    unreadable: Sequence[Path] = field(default=(), compare=False)

    @property
    def done(self) -> int:
        return self.captions + self.rejects


def has_outcomes(run: CaptionRun) -> bool:
    """Returns whether anything was committed or finished, which binds a run to its input and its settings.

    Call roll_forward() first. Raises OSError for a folder that cannot be read, lest it be taken for empty.
    """
    folders = (run.captions, run.rejects, run.outcomes)
    return any(
        name.endswith((".parquet", SET_ASIDE)) and not name.startswith(".")
        for folder in folders
        if folder.exists()
        for _, _, names in os.walk(folder, onerror=_fail)
        for name in names
    )


def begin_anew(run: CaptionRun) -> None:
    """Removes what tries without an outcome left behind: settings, manifest, folders of sessions.

    The caller holds the run's lock. A kill in the middle leaves a run without an outcome again. The numbers
    of sessions go on: workers of a dead session, should any be left, must not write into a new one's folder.
    """
    run.settings.unlink(missing_ok=True)
    for shard in run.shards():
        shard.unlink()
    abandoned = run.work / "abandoned"
    shutil.rmtree(abandoned, ignore_errors=True)
    if run.outcomes.exists():
        run.outcomes.rename(abandoned)  # at once, while such a worker may be writing there
        shutil.rmtree(abandoned, ignore_errors=True)


def _fail(error: OSError) -> None:
    raise error


def survey(
    run: CaptionRun, retry_rejects: str | None = None, since: int | None = None
) -> tuple[Done, RunProgress]:
    """Reads what is done; with retry_rejects (a reason, or `all`) those rejects count as not done.

    since: the first session of that retry, as retry_since() gives it: rejects of its sessions are done.
    """
    done = [np.zeros(pq.read_metadata(path).num_rows, dtype=np.bool_) for path in run.shards()]
    rejected = [np.zeros_like(flags) for flags in done]
    reasons: Counter[str] = Counter()
    for number, path in enumerate(run.shards()):
        kept, refused = run.captions / path.name, run.rejects / path.name
        if kept.exists() or refused.exists():
            ids = read_part(path, columns=["id"])["id"]
            if kept.exists():
                done[number][_positions(read_part(kept, columns=["id"])["id"], ids)] = True
            if refused.exists():
                table = read_part(refused, columns=["id", "reason"])
                reasons.update(table["reason"].to_pylist())
                rejected[number][_positions(_still_rejected(table, retry_rejects)["id"], ids)] = True
    unreadable = []
    for path in outcome_files(run):
        table = read_outcomes(path)
        if table is None:
            unreadable.append(path)
            continue
        captions = table.filter(pc.equal(table[OUTCOME], "caption"))
        refusals_of_all = table.filter(pc.equal(table[OUTCOME], "reject"))
        reasons.update(refusals_of_all["reason"].to_pylist())
        tried = since is not None and session_of(run, path) >= since
        rejects = _still_rejected(refusals_of_all, None if tried else retry_rejects)
        for flagged, part in ((done, captions), (rejected, rejects)):
            shards, rows = part["shard"].to_numpy(), part["row"].to_numpy()
            for number in np.unique(shards):
                flagged[number][rows[shards == number]] = True
    captions_done = sum(int(flags.sum()) for flags in done)
    for flags, refusals in zip(done, rejected, strict=True):
        flags |= refusals
    rows, total = sum(len(flags) for flags in done), sum(int(flags.sum()) for flags in done)
    rejects_done, by_reason = total - captions_done, dict(reasons.most_common())
    return done, RunProgress(rows, captions_done, rejects_done, by_reason, unreadable)


def _still_rejected(table: pa.Table, retry: str | None) -> pa.Table:
    if retry is None:
        return table
    if retry == ALL_REASONS:
        return table.slice(0, 0)
    return table.filter(pc.not_equal(table["reason"], retry))


def _positions(ids: pa.ChunkedArray, among: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    found = pc.index_in(ids, value_set=among.combine_chunks())
    assert found.null_count == 0, "a finished part holds an id that its manifest shard does not"
    return np.asarray(
        found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy()
    )
