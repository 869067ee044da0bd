"""Normalises any manifest to Parquet shards in a run folder whose ids are known to be unique."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import stored
from sharegpt4v.manifest.ids import IdSet, Mask
from sharegpt4v.manifest.locate import locate
from sharegpt4v.manifest.parquet import stream_columns
from sharegpt4v.manifest.read import read_batches
from sharegpt4v.manifest.rows import path_id
from sharegpt4v.manifest.sample import spread
from sharegpt4v.manifest.writer import ShardWriter, shards
from sharegpt4v.records import LOCATION_COLUMNS, MANIFEST

NAMED = 5  # ids that a message lists

LEAST_SHARED = 0.1
"""Of the fewer of two lists of ids, the share below which they are taken for lists of other images."""


@dataclass(frozen=True)
class Manifest:
    """A normalised manifest, and what was noticed on the way.

    rows, sources: what the folder holds now, all and by source. added: rows that this call brought.
    root: where image paths and containers start, for ImageReader.
    same_image_ids: rows of the input whose image an earlier id has too (allowed, worth knowing).
    without_image, repeats: records dropped by dedupe_image.
    ignored: what an image folder or an archive held beside images: files by suffix, the rest in words.
    """

    folder: Path
    rows: int
    added: int
    sources: dict[str, int]
    root: str
    same_image_ids: int = 0
    without_image: int = 0
    repeats: int = 0
    ignored: dict[str, int] = field(default_factory=dict)

    def ids(self) -> Iterator[pa.Array]:
        """Yields all ids in order, a column chunk at a time."""
        for batch in _batches(self.folder, ["id"]):
            yield batch["id"]


def normalise(
    path: str,
    root: str | None,
    out_dir: Path,
    *,
    limit: int | None = None,
    shard_rows: int = 50_000,
    sample: int | None = None,
    source: str | None = None,
    dedupe_image: bool = False,
    joins: str | None = None,
    record: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Writes a manifest (see read_rows) to out_dir as Parquet shards of records.MANIFEST.

    A manifest that is there already is joined: new ids are appended as new shards, equal rows are passed
    over, rows whose id now has another image or source are refused, and ids that are gone stay. limit
    takes only the first rows, sample so many spread over all sources; a later call without them joins the
    rest. source: of rows that name none. dedupe_image takes each image once,
    under its path as id, and drops records without one. joins: where the ids in out_dir were read; an input
    that hardly has any of them is then refused, naming both. record: a file that says what out_dir was made
    of; while that is unchanged, the manifest is taken as it is. progress is called with the number of records
    read so far. Raises UserError; out_dir is then as it was.
    """
    if sample is not None and limit is not None:
        raise UserError(
            "takes the first images, and `sample` some of every source: give one of them", field="limit"
        )
    located = locate(path, root)
    asked = {"images": path, "root": located.root, "limit": limit, "sample": sample, "source": source}
    asked |= {"dedupe_image": dedupe_image}
    if record and (facts := stored.reuse(record, asked, located, out_dir)):
        return Manifest(out_dir, added=0, root=located.root, **facts)
    intake = _Intake(path, out_dir, dedupe_image, located.ignored)
    rows = _input_rows(read_batches(located, source), intake, limit, progress or (lambda read: None))
    with ShardWriter(out_dir, shard_rows) as writer:
        for batch in rows if sample is None else spread(rows, sample):
            writer.write(intake.join(batch))
        intake.refuse()
        if joins is not None:
            intake.refuse_others(f"{path} below {located.root}", joins)
        writer.publish()
    facts = intake.facts() | {"ignored": dict(located.ignored.most_common())}
    if record:
        stored.keep(record, asked, located, out_dir, facts)
    return Manifest(out_dir, added=writer.rows, root=located.root, **facts)


def _input_rows(
    batches: Iterator[pa.RecordBatch], intake: "_Intake", limit: int | None, progress: Callable[[int], None]
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of the input that count, up to the limit."""
    read = 0
    for batch in batches:
        read += batch.num_rows
        yield intake.take(batch, None if limit is None else limit - intake.taken)
        progress(read)
        if intake.taken == limit:
            return


class _Intake:
    """Decides row by row, a batch at a time, what is new, known, repeated or changed."""

    def __init__(self, name: str, folder: Path, dedupe_image: bool, ignored: Counter[str]) -> None:
        self._name = name
        self._ignored = ignored
        self._folder = folder
        self._dedupe = dedupe_image
        self._seen = IdSet()
        self._images = IdSet()
        self._known = IdSet()
        self.sources: Counter[str] = Counter()
        for batch in _batches(folder, ["id", "source", *LOCATION_COLUMNS]):
            self._known.add(_row_keys(batch))
            self._count(batch)
        self._joined = self._shared = 0
        self.taken = self.same_image_ids = self.without_image = self.repeats = self._changed = 0
        self._examples: list[str] = []

    @cached_property
    def _known_ids(self) -> IdSet:
        return IdSet(batch["id"] for batch in _batches(self._folder, ["id"]))

    def take(self, batch: pa.RecordBatch, most: int | None) -> pa.RecordBatch:
        """Returns the rows that count, each id once and `most` at most; refuse() raises what is wrong."""
        if not self._dedupe:
            batch = batch.slice(0, most)
        if batch["image"].null_count:
            self.without_image += batch["image"].null_count
            batch = batch.filter(pc.is_valid(batch["image"]))
        if self._dedupe:
            batch = batch.set_column(0, "id", path_id(batch["image"], batch["container"]))
        first = self._seen.add(batch["id"])
        self.repeats += self._note(batch, ~first)
        batch = _where(batch, first).slice(0, most)
        self.taken += batch.num_rows
        self.same_image_ids += int((~self._images.add(_keys(batch, LOCATION_COLUMNS))).sum())
        return batch

    def join(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Returns the rows that the folder does not hold yet, as rows of records.MANIFEST."""
        self._joined += batch.num_rows
        if len(self._known):
            batch = self._unknown(batch)
        self._count(batch)
        return pa.RecordBatch.from_arrays(batch.columns, schema=MANIFEST)

    def refuse(self) -> None:
        """Raises UserError for what is wrong with the whole input, with numbers and first ids."""
        read = self.taken + self.repeats + self.without_image
        listed = ", ".join(self._examples)
        if not read:
            found = ", ".join(f"{count} {what}" for what, count in self._ignored.most_common(5))
            raise UserError(f"{self._name} is empty: it names no image{found and f' (found: {found})'}")
        if self._dedupe and not self.taken:
            raise UserError(f"{self._name}: none of its {read} records has an image")
        if self.without_image and not self._dedupe:
            repeats = f" and {self.repeats} ids repeat (first: {listed})" if self.repeats else ""
            raise UserError(
                f"{self._name}: {self.without_image} of {read} records have no image{repeats}, as in a "
                "conversation file; `dedupe_image` takes each image once and drops records without one"
            )
        if self.repeats and not self._dedupe:
            raise UserError(
                f"{self._name}: {self.repeats} of {read} ids repeat (first: {listed}); make them unique, or "
                "let `dedupe_image` take each image once under its path"
            )
        if self._changed:
            raise UserError(
                f"{self._name}: {self._changed} ids are in {self._folder} already with another image or "
                f"source (first: {listed}); give the rows new ids or use a new run folder"
            )

    def facts(self) -> dict[str, Any]:
        """Returns what a Manifest says of its rows."""
        return {
            "rows": self.sources.total(),
            "sources": dict(sorted(self.sources.items())),
            "same_image_ids": self.same_image_ids,
            "without_image": self.without_image,
            "repeats": self.repeats,
        }

    def refuse_others(self, now: str, before: str) -> None:
        """Raises UserError where hardly an id is known: all would be done again under their new ids."""
        known = len(self._known)
        if known and self._shared < LEAST_SHARED * min(known, self._joined):
            raise UserError(
                f"{now} has {self._shared:,} of the {known:,} ids in {self._folder}, which were read from "
                f"{before}: put `images` and `root` back, or give another `out`"
            )

    def _unknown(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        known = self._known.contains(_row_keys(batch))
        self._shared += int(known.sum())
        batch = _where(batch, ~known)
        if batch.num_rows:
            self._changed += self._note(batch, self._known_ids.contains(batch["id"]))
        return batch

    def _note(self, batch: pa.RecordBatch, wrong: Mask) -> int:
        """Adds up the rows that are wrong and keeps the first of them for the message."""
        for row in np.flatnonzero(wrong)[: NAMED - len(self._examples)]:
            self._examples.append(batch["id"][int(row)].as_py())
        return int(wrong.sum())

    def _count(self, batch: pa.RecordBatch) -> None:
        for entry in pc.value_counts(batch["source"]).to_pylist():
            self.sources[entry["values"]] += entry["counts"]


def _where(batch: pa.RecordBatch, mask: Mask) -> pa.RecordBatch:
    return batch if mask.all() else batch.filter(pa.array(mask))


def _row_keys(batch: pa.RecordBatch) -> pa.Array:
    """Returns what must not change under an id as one text a row."""
    return _keys(batch, ("id", "source", *LOCATION_COLUMNS))


def _keys(batch: pa.RecordBatch, columns: tuple[str, ...]) -> pa.Array:
    return pc.binary_join_element_wise(*(batch[column].cast(pa.string()) for column in columns), "\0")


def _batches(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for shard in shards(folder):
        yield from stream_columns(shard, columns)
