"""What a run has already done, and what is still to do.

Done is what finished parts (captions/, rejects/) or undamaged files of work/outcomes hold. The result
is one bit per manifest row.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
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

FILES_AT_ONCE = 512

_SURVEYED = (OUTCOME, "shard", "row", "reason")


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

    since: the first session of that retry, as retry_since() gives it: rejects of its sessions are done. Of
    outcomes only the columns that this needs are read and checked; the finish step checks all.
    """
    found = _Found([np.zeros(pq.read_metadata(path).num_rows, dtype=np.bool_) for path in run.shards()])
    _add_parts(run, retry_rejects, found)
    unreadable = _add_outcomes(run, retry_rejects, since, found)
    captions = sum(int(flags.sum()) for flags in found.captioned)
    for flags, refusals in zip(found.captioned, found.rejected, strict=True):
        flags |= refusals
    rows, total = sum(map(len, found.captioned)), sum(int(flags.sum()) for flags in found.captioned)
    reasons = dict(found.reasons.most_common())
    return found.captioned, RunProgress(rows, captions, total - captions, reasons, unreadable)


class _Found:
    """Which rows have a caption, which have a reject that stays one, and all rejects by reason."""

    def __init__(self, none: Done) -> None:
        self.captioned = none
        self.rejected = [np.zeros_like(flags) for flags in none]
        self.reasons: Counter[str] = Counter()

    def count(self, reasons: pa.ChunkedArray) -> None:
        for entry in pc.value_counts(reasons).to_pylist():
            self.reasons[entry["values"]] += entry["counts"]


def _add_parts(run: CaptionRun, retry: str | None, found: _Found) -> None:
    for number, path in enumerate(run.shards()):
        kept, refused = run.captions / path.name, run.rejects / path.name
        if kept.exists() or refused.exists():
            ids = read_part(path, columns=["id"])["id"]
            if kept.exists():
                found.captioned[number][_positions(read_part(kept, columns=["id"])["id"], ids)] = True
            if refused.exists():
                table = read_part(refused, columns=["id", "reason"])
                found.count(table["reason"])
                found.rejected[number][_positions(_still_rejected(table, retry)["id"], ids)] = True


def _add_outcomes(run: CaptionRun, retry: str | None, since: int | None, found: _Found) -> list[Path]:
    """Returns the files that are damaged."""
    unreadable: list[Path] = []
    files = outcome_files(run)
    # Of one session some hundred files at a time: the work on a table costs as much as reading a file.
    for number, group in groupby(files, key=lambda path: session_of(run, path)):
        tried = since is not None and number >= since
        while chunk := list(islice(group, FILES_AT_ONCE)):
            tables = [(path, read_outcomes(path, _SURVEYED)) for path in chunk]
            unreadable += [path for path, table in tables if table is None]
            whole = [table for _, table in tables if table is not None]
            if whole:
                _add_table(pa.concat_tables(whole), None if tried else retry, found)
    return unreadable


def _add_table(table: pa.Table, retry: str | None, found: _Found) -> None:
    refused = table.filter(pc.equal(table[OUTCOME], "reject"))
    found.count(refused["reason"])
    captions = table.filter(pc.equal(table[OUTCOME], "caption"))
    for flagged, part in ((found.captioned, captions), (found.rejected, _still_rejected(refused, retry))):
        shards, rows = part["shard"].to_numpy(), part["row"].to_numpy()
        for number in np.unique(shards):
            flagged[number][rows[shards == number]] = True


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
