"""One outcome for each image, out of finished parts and of whatever sessions committed.

The finish step settles a complete run; an export settles one that is under way and changes nothing in its
folder. Memory holds one manifest shard at a time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import outcome_files, read_outcomes
from sharegpt4v.captions.parts import read_part
from sharegpt4v.records import CAPTIONS, OUTCOME, OUTCOMES, REJECTS


@dataclass(frozen=True, slots=True)
class SettledShard:
    """One manifest shard of `rows` images, by its file `name`.

    outcomes: records.OUTCOMES, one row for each manifest row that has an outcome, in manifest order.
    missing: the first three ids without one. dropped: captions that a later one replaced. unreadable: files
    of outcomes that are damaged, whose rows are not among them.
    """

    name: str
    rows: int
    outcomes: pa.Table
    missing: list[str]
    dropped: int
    unreadable: list[Path]


@dataclass(slots=True)
class Counts:
    """What the audit counted; summary.json is made of it."""

    rows: int = 0
    captions: int = 0
    rejects: int = 0
    tokens: int = 0
    duplicates_dropped: int = 0
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    by_reason: Counter[str] = field(default_factory=Counter)
    lengths: list[Any] = field(default_factory=list)  # arrays of characters a caption
    digests: list[pa.ChunkedArray] = field(default_factory=list)  # 128 bits in hex of each captioned image

    @property
    def duplicates(self) -> int:
        """Captioned images with the bytes of another one before them."""
        digests = pa.chunked_array([chunk for column in self.digests for chunk in column.chunks], pa.string())
        return len(digests) - int(pc.count_distinct(digests).as_py())

    def add(self, shard: SettledShard) -> None:
        """Adds the outcomes of one more shard."""
        table = shard.outcomes
        captions = table.filter(pc.equal(table[OUTCOME], "caption"))
        self.rows += len(table)
        self.captions += len(captions)
        self.rejects += len(table) - len(captions)
        self.tokens += pc.sum(captions["tokens"]).as_py() or 0
        self.duplicates_dropped += shard.dropped
        self.digests.append(pc.utf8_slice_codeunits(captions["image_sha256"].drop_null(), 0, 32))
        self.lengths.append(pc.utf8_length(captions["caption"]).to_numpy())
        groups = table.group_by(["source", OUTCOME]).aggregate([([], "count_all")])
        for source, outcome, count in zip(*(column.to_pylist() for column in groups.columns), strict=True):
            entry = self.by_source.setdefault(source, {"captions": 0, "rejects": 0})
            entry[f"{outcome}s"] += count
        for reason in pc.value_counts(table["reason"].combine_chunks().drop_null()).to_pylist():
            self.by_reason[reason["values"]] += reason["counts"]


def settled_shards(run: CaptionRun, captions: Path, rejects: Path) -> Iterator[SettledShard]:
    """Yields every shard of the manifest with what is known of its images.

    captions, rejects: the folders of finished parts; a part that is not there counts as empty.
    """
    files = _files_by_shard(run)
    for number, path in enumerate(run.shards()):
        ids = read_part(path, columns=["id"])["id"].combine_chunks()
        parts = (("caption", captions / path.name), ("reject", rejects / path.name))
        known, unreadable = _shard_rows(parts, number, ids, files[number])
        table, dropped = _settled(known)
        absent = np.setdiff1d(np.arange(len(ids)), table["row"].to_numpy())
        wrong = pc.any(pc.not_equal(table["id"], ids.take(table["row"].combine_chunks()))).as_py()
        assert not wrong, f"an outcome of {path.name} carries another id than its manifest row"
        missing = [ids[int(row)].as_py() for row in absent[:3]]
        yield SettledShard(path.name, len(ids), table, missing, dropped, unreadable)


def write_parts(shard: SettledShard, captions: Path, rejects: Path) -> None:
    """Writes one part of each kind, named like the manifest shard, into folders that exist."""
    table = shard.outcomes
    for outcome, schema, folder in (("caption", CAPTIONS, captions), ("reject", REJECTS, rejects)):
        part = table.filter(pc.equal(table[OUTCOME], outcome)).select(schema.names).cast(schema)
        pq.write_table(part, folder / shard.name, write_page_checksum=True)


def _files_by_shard(run: CaptionRun) -> defaultdict[int, list[Path]]:
    files: defaultdict[int, list[Path]] = defaultdict(list)
    for path in outcome_files(run):
        table = read_outcomes(path, ["shard"])
        for number in [] if table is None else pc.unique(table["shard"]).to_pylist():
            files[number].append(path)
    return files


def _shard_rows(
    parts: tuple[tuple[str, Path], ...], number: int, ids: pa.Array, files: list[Path]
) -> tuple[pa.Table, list[Path]]:
    """Returns all rows known of one shard, the oldest first: finished parts, then the sessions' files.

    Also returns the files that are damaged.
    """
    unreadable = []
    tables = [_as_outcomes(read_part(part), outcome, number, ids) for outcome, part in parts if part.exists()]
    for file in files:
        table = read_outcomes(file)
        if table is None:
            unreadable.append(file)
            continue
        rows = table.filter(pc.equal(table["shard"], number))
        tables.append(rows.select(OUTCOMES.names).cast(OUTCOMES))
    return pa.concat_tables(tables) if tables else OUTCOMES.empty_table(), unreadable


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
    """Keeps one row for each manifest row, in its order: a caption before a reject, then the later one.

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
