"""Streamed reading of the Parquet parts of a finished run folder: manifest/, captions/, rejects/."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from sharegpt4v.errors import UserError
from sharegpt4v.records import LOCATION_COLUMNS

Kind = Literal["manifest", "captions", "rejects"]

_LOCATION = ["id", *LOCATION_COLUMNS]

BATCH_ROWS = 16_384
"""Rows held at once: about 16 MB of captions at the paper's mean length (reference: 826 characters)."""


@dataclass(frozen=True)
class Location:
    """Where the bytes of one image lie, in the terms of `records.MANIFEST`."""

    image: str
    container: str
    offset: int  # bytes
    size: int  # bytes, -1 for the whole file


def paths(run: Path, kind: Kind) -> list[Path]:
    """Returns the parts of one kind in name order; a kind without a row may have no part at all."""
    return sorted((run / kind).glob("part-*.parquet"))


def count(run: Path, kind: Kind) -> int:
    """Returns the number of rows of one kind, from the Parquet footers alone."""
    return sum(pq.read_metadata(path).num_rows for path in paths(run, kind))


def batches(
    run: Path, kind: Kind, columns: list[str] | None = None, rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yields batches of at most `rows` rows in file order; memory stays flat however many rows there are."""
    for path in paths(run, kind):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)


def rows_at(run: Path, kind: Kind, positions: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Returns rows by their position in file order; only the files that hold one are read."""
    found: dict[int, dict[str, Any]] = {}
    wanted, start = sorted(positions), 0
    for path in paths(run, kind):
        stop = start + pq.read_metadata(path).num_rows
        inside = [position for position in wanted if start <= position < stop]
        if inside:
            rows = pq.read_table(path).take(pa.array([position - start for position in inside]))
            found |= dict(zip(inside, rows.to_pylist(), strict=True))
        start = stop
    return found


def locations(run: Path, ids: Iterable[str]) -> dict[str, Location]:
    """Returns the locations of the images of these ids, in manifest order; unknown ids are left out.

    Reads the whole manifest. For the images of all captions, one after another: `Locations`.
    """
    files = paths(run, "manifest")
    if not files:
        return {}
    wanted = pc.field("id").isin(pa.array(ids, pa.string()))
    found = pads.dataset([str(path) for path in files]).to_table(columns=_LOCATION, filter=wanted)
    return {row.pop("id"): Location(**row) for row in found.to_pylist()}


class Locations:
    """The locations of images in manifest order, read once from front to back as they are asked for."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._batches = batches(run, "manifest", _LOCATION)
        self._left: pa.RecordBatch | None = None  # rows of the manifest behind the last id that was found

    def after_the_last(self, ids: pa.Array) -> list[Location]:
        """Returns the locations of these ids, which follow those of the last call.

        Raises UserError when the manifest does not hold them in this order: the run has changed meanwhile.
        """
        found: list[Location] = []
        while len(found) < len(ids):
            batch = self._left if self._left is not None else next(self._batches, None)
            if batch is None:
                raise self._other_order(ids[len(found)])
            rows = pc.indices_nonzero(pc.is_in(batch.column("id"), ids[len(found) :]))
            places = batch.take(rows)
            if not places.column("id").equals(ids[len(found) : len(found) + len(rows)]):
                raise self._other_order(ids[len(found)])
            found += [Location(**row) for row in places.select(LOCATION_COLUMNS).to_pylist()]
            self._left = batch.slice(rows[-1].as_py() + 1) if len(found) == len(ids) else None
        return found

    def _other_order(self, name: pa.Scalar) -> UserError:
        return UserError(
            f"{self._run}/manifest does not hold {name.as_py()!r} in the order of its captions: another "
            "command works on the run, wait for that and begin again"
        )
