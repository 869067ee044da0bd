"""Manifest rows as Arrow batches: what a reader may leave out, and how it is filled in."""

from reprlib import Repr
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.sources import source_of
from sharegpt4v.records import MANIFEST

BATCH_ROWS = 8192
"""Rows read at a time: about 10 MB where each row carries a detailed caption."""

_SHORT = Repr()
"""Shows values of any depth and length; repr() fails for lists nested some hundred deep."""
_SHORT.maxstring = _SHORT.maxother = 60

RAW = pa.schema([field.with_nullable(True) for field in MANIFEST])
"""What a reader yields: null where a record lacks the field."""


def raw_batch(**columns: pa.Array) -> pa.RecordBatch:
    """Returns a RAW batch of the given columns (equal lengths); the others are null."""
    rows = len(next(iter(columns.values())))
    arrays = [columns.get(field.name, pa.nulls(rows, field.type)) for field in RAW]
    return pa.RecordBatch.from_arrays(arrays, schema=RAW)


def complete(raw: pa.RecordBatch, name: str, first: int, source: str | None = None) -> pa.RecordBatch:
    """Fills in what records may leave out; afterwards only `image` (a record without one) can be null.

    A missing id becomes the relative path, "" counts as no image. A missing source becomes `source`, or is
    taken from the path (source_of). name and first: the manifest and the number of the batch's first record,
    for messages.
    Raises UserError at an id that is empty, and at an id or a path with a NUL character.
    """
    for column in ("id", "image"):
        _refuse(pc.match_substring(raw[column], "\0"), f"a NUL character in its {column}", name, first)
    _refuse(pc.equal(raw["id"], ""), "an empty id: drop the key to use the image's path instead", name, first)
    image = pc.if_else(pc.equal(raw["image"], ""), None, raw["image"])
    container = pc.coalesce(raw["container"], "")
    columns = {
        "id": pc.coalesce(raw["id"], path_id(image, container), ""),
        "image": image,
        "source": pc.coalesce(raw["source"], source or source_of(pc.coalesce(image, ""))),
        "container": container,
        "offset": pc.coalesce(raw["offset"], 0),
        "size": pc.coalesce(raw["size"], -1),
        "conversations": raw["conversations"],
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=RAW)


def path_id(image: pa.Array, container: pa.Array) -> pa.Array:
    """Returns the id of a row without one: its image's path, after its shard's if it has one."""
    inside = pc.binary_join_element_wise(container, image, "/")
    return pc.if_else(pc.equal(container, ""), image, inside)


def refuse_type(name: str, record: int, column: str, value: object, needs: str) -> NoReturn:
    """Raises the UserError for a value of the wrong type; records count from 1."""
    shown = _SHORT.repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise UserError(f"{name}: record {record} has {column} {shown}; it needs {needs}")


def _refuse(bad: pa.Array, problem: str, name: str, first: int) -> None:
    at = pc.index(bad, True).as_py()
    if at >= 0:
        raise UserError(f"{name}: record {first + at} has {problem}")
