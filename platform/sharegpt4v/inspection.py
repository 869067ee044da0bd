"""Collects what an inspection of every image found: counts by source and kind, each finding as a reject row.

Which images are there twice is only known once all were seen. Until then the rows wait in a scratch file,
and memory holds 16 bytes an image: a million images that are all missing cost no more than sound ones.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharegpt4v import records
from sharegpt4v.atomic import atomic_path
from sharegpt4v.records import MANIFEST, REJECTS

UNREAD = "unread"
"""Reason and kind of images whose storage failed. Captioning does not reject them, it puts them off."""

KINDS = ("missing", "broken", "oversized", UNREAD)
"""Kinds of images that cannot be captioned; several reasons belong to one kind."""

DIGEST_BYTES = 16
"""Of the SHA-256. Two different images among 1.2 million share them with a chance of 2e-27."""

INSPECTED = pa.schema(
    [
        *[MANIFEST.field(name) for name in ("id", "image", "source")],
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
    ]
)
"""One row an image, before duplicates are known."""

DUPLICATES = pa.schema(
    [
        *[MANIFEST.field(name) for name in ("id", "image", "source")],
        pa.field("original", pa.string(), nullable=False),
    ]
)
"""Images that repeat an earlier one. They are usable: captioning describes them like any other."""

COLUMNS: Mapping[str, str] = {
    **records.COLUMNS,
    "digest": "first 16 bytes of the file's SHA-256; zeros where it was not read",
    "reason": "stable code that summaries count by; null: nothing is wrong with this image by itself",
    "original": "id of the first image with the same bytes",
}
"""What each column of these schemas holds; the documentation is made from it."""

_OVERSIZED = frozenset({"too_large", "bad_aspect", "bomb"})
_WAITING = pa.schema([column for column in INSPECTED if column.name != "digest"])
_BATCH_ROWS = 8_192

Positions = npt.NDArray[np.int64]


@dataclass(slots=True)
class InspectionSummary:
    """by_source: source to counts of images, usable, each of KINDS, and duplicate (part of usable).

    by_reason: reject reason to images. examples: reason to its first image, a row of records.REJECTS.
    """

    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    by_reason: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def count(self, column: str) -> int:
        """Returns images of all sources: `images`, `usable`, `duplicate` or one of KINDS."""
        return sum(counts[column] for counts in self.by_source.values())


class Inspection:
    """Takes INSPECTED rows in manifest order: of equal images the first is the original."""

    def __init__(self, scratch: Path) -> None:
        """Opens the scratch file. scratch: a folder for rows until settle(); the caller removes it."""
        self._waiting = scratch / "inspected.arrow"
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._writer = pa.ipc.new_file(self._waiting, _WAITING, options=options)
        self._digests: list[npt.NDArray[np.uint64]] = []  # shape (rows, 2)
        self._sound: list[npt.NDArray[np.bool_]] = []

    def add(self, table: pa.Table) -> None:
        """Adds rows of INSPECTED that follow those of the previous call."""
        self._writer.write_table(table.select(_WAITING.names).cast(_WAITING), max_chunksize=_BATCH_ROWS)
        digests = b"".join(table["digest"].to_pylist())
        self._digests.append(np.frombuffer(digests, np.uint64).reshape(-1, 2))
        self._sound.append(pc.is_null(table["reason"]).to_numpy())

    def settle(self, rejects: Path, duplicates: Path) -> InspectionSummary:
        """Finds the duplicates, counts, and writes the Parquet files of records.REJECTS and DUPLICATES.

        Both appear whole or not at all, in manifest order. To be called once, at the end.
        """
        self._writer.close()
        originals = self._originals()
        twins = np.unique(originals[originals >= 0])
        ids = self._ids(twins)
        found, start = InspectionSummary(), 0
        with (
            atomic_path(rejects) as rejects_path,
            atomic_path(duplicates) as duplicates_path,
            pq.ParquetWriter(rejects_path, REJECTS, compression="zstd") as rejects_writer,
            pq.ParquetWriter(duplicates_path, DUPLICATES, compression="zstd") as duplicates_writer,
        ):
            for batch in self._batches():
                part = originals[start : start + batch.num_rows]
                start += batch.num_rows
                table = pa.table(batch).append_column("original", _names(part, twins, ids))
                _count(found, table)
                wrong = _as_rejects(table.filter(pc.is_valid(table["reason"])))
                for reason in set(pc.unique(wrong["reason"]).to_pylist()) - found.examples.keys():
                    found.examples[reason] = wrong.filter(pc.equal(wrong["reason"], reason)).to_pylist()[0]
                rejects_writer.write_table(wrong)
                repeats = table.filter(pc.is_valid(table["original"])).select(DUPLICATES.names)
                duplicates_writer.write_table(repeats.cast(DUPLICATES))
        return found

    def _originals(self) -> Positions:
        """Returns, for each sound row whose bytes an earlier row has, that row's position; -1 elsewhere."""
        sound = np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *self._sound]))
        digests = np.concatenate([np.zeros((0, 2), np.uint64), *self._digests])
        self._digests.clear()
        originals = np.full(len(digests), -1, np.int64)
        high, low = digests[sound].T
        order = np.lexsort((low, high))  # stable: equal digests stay in manifest order
        fresh = np.ones(len(order), np.bool_)
        fresh[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        ordered = sound[order]
        first = ordered[fresh][np.cumsum(fresh) - 1]
        originals[ordered[~fresh]] = first[~fresh]
        return originals

    def _ids(self, wanted: Positions) -> pa.Array:
        """Reads the ids of the rows `wanted`, in ascending order."""
        ids, start = [pa.array([], pa.string())], 0
        for batch in self._batches():
            first, last = np.searchsorted(wanted, (start, start + batch.num_rows))
            ids.append(batch["id"].take(pa.array(wanted[first:last] - start)))
            start += batch.num_rows
        return pa.concat_arrays(ids)  # a take from many chunks would join them each time

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self._waiting)) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def _names(originals: Positions, twins: Positions, ids: pa.Array) -> pa.Array:
    """Returns the id of each row's original, null where it has none. ids: of the rows `twins`, ascending."""
    places = pa.array(np.searchsorted(twins, originals), mask=originals < 0)
    return ids.take(places)


def _count(found: InspectionSummary, table: pa.Table) -> None:
    columns = [table["source"], table["reason"], pc.is_valid(table["original"])]
    keyed = pa.table(columns, names=["source", "reason", "repeats"])
    groups = keyed.group_by(keyed.column_names).aggregate([([], "count_all")])
    for group in groups.to_pylist():
        source, reason, count = group["source"], group["reason"], group["count_all"]
        counts = found.by_source.setdefault(source, Counter())
        counts["images"] += count
        counts[_kind(reason) if reason else "usable"] += count
        if group["repeats"]:
            counts["duplicate"] += count
        if reason:
            found.by_reason[reason] += count


def _kind(reason: str) -> str:
    if reason in KINDS:
        return reason
    return "oversized" if reason in _OVERSIZED else "broken"


def _as_rejects(table: pa.Table) -> pa.Table:
    rows = len(table)
    columns = {name: table[name] for name in _WAITING.names}
    columns |= {"stage": pa.array(["check"] * rows, pa.string()), "attempt": pa.array([0] * rows, pa.int32())}
    columns["caption"] = pa.nulls(rows, pa.string())  # nothing was written
    return pa.table([columns[name] for name in REJECTS.names], schema=REJECTS)
