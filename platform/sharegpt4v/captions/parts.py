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
from sharegpt4v.records import LOCATION_COLUMNS, MANIFEST

Kind = Literal["manifest", "captions", "rejects"]

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


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a whole part, or some of its columns. Raises UserError that names a damaged one."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None):
            raise  # the storage failed; pyarrow reports damaged content as an OSError without a number
        again = "restore it" if path.parent.name == "manifest" else "remove it"
        raise UserError(f"{path} is damaged: {again}, then give the run's command again") from error


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
    """Returns the locations of the images of these ids, in manifest order; unknown ids are left out."""
    files = paths(run, "manifest")
    if not files:
        return {}
    wanted = pc.field("id").isin(pa.array(ids, pa.string()))
    columns = ["id", *LOCATION_COLUMNS]
    found = pads.dataset([str(path) for path in files]).to_table(columns=columns, filter=wanted)
    return {row.pop("id"): Location(**row) for row in found.to_pylist()}


def locations_in_order(run: Path, ids: Iterable[pa.Array]) -> Iterator[list[Location]]:
    """Yields the locations of each array of ids; together they are in manifest order, as captions are.

    Reads the manifest once, however many arrays there are, and holds what lies between two ids of an array.
    """
    rows = batches(run, "manifest", ["id", *LOCATION_COLUMNS])
    ahead = pa.Table.from_batches([], MANIFEST).select(["id", *LOCATION_COLUMNS])
    for wanted in ids:
        places = pc.index_in(wanted, value_set=ahead["id"].combine_chunks())
        while places.null_count:
            more = next(rows, None)
            assert more is not None, "captions hold an id that the manifest does not, or not in its order"
            ahead = pa.concat_tables([ahead, pa.Table.from_batches([more]).cast(ahead.schema)])
            places = pc.index_in(wanted, value_set=ahead["id"].combine_chunks())
        found = ahead.select(LOCATION_COLUMNS).take(places)
        yield [Location(**row) for row in found.to_pylist()]
        ahead = ahead.slice((pc.max(places).as_py() or 0) + 1 if len(places) else 0)
