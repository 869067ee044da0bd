"""Parquet manifests, read a row group at a time without a Python object for a row."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.rows import BATCH_ROWS, RAW, refuse_type

COLUMN_BUFFER = 1 << 18  # bytes a column is read ahead, so that one huge row group needs no more memory


def read_parquet(file: IO[bytes], name: str) -> Iterator[pa.RecordBatch]:
    """Yields RAW batches of one file. Columns that a manifest does not know are not read.

    Raises UserError for a damaged file, a missing image column, and columns of a type that cannot be taken.
    """
    try:
        parquet = pq.ParquetFile(file, buffer_size=COLUMN_BUFFER, pre_buffer=False)
        schema = parquet.schema_arrow
        _require_image(schema, name)
        first = 1
        known = [field.name for field in RAW if field.name in schema.names]
        for batch in parquet.iter_batches(BATCH_ROWS, columns=known, use_threads=False):
            yield _raw(batch, name, first)
            first += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name} is not a whole Parquet file: {str(error).splitlines()[0]}") from error


def stream_columns(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields some columns of a Parquet file of our own, in batches; memory stays flat for any size."""
    with pq.ParquetFile(path, buffer_size=COLUMN_BUFFER, pre_buffer=False) as parquet:
        # Threads would each keep an arena of freed buffers: 100 MB more for a million rows, and no faster.
        yield from parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)


def _require_image(schema: pa.Schema, name: str) -> None:
    if "image" in schema.names:
        return
    near = get_close_matches("image", schema.names, n=1, cutoff=0.5)
    hint = f"; rename {near[0]}?" if near else ""
    raise UserError(f"{name} has no column image: it has {', '.join(schema.names[:20])}{hint}")


def _raw(batch: pa.RecordBatch, name: str, first: int) -> pa.RecordBatch:
    columns = []
    for field in RAW:
        if field.name not in batch.schema.names:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch[field.name]
        if field.name == "id" and column.null_count:
            record = first + pc.index(pc.is_null(column), True).as_py()
            refuse_type(name, record, "id", None, "text or a whole number")
        columns.append(_cast(column, field, name))
    return pa.RecordBatch.from_arrays(columns, schema=RAW)


def _cast(column: pa.Array, field: pa.Field, name: str) -> pa.Array:
    kind = column.type
    if kind == field.type or pt.is_null(kind):
        return column.cast(field.type)
    plain = kind.value_type if pt.is_dictionary(kind) else kind
    text = pt.is_string(plain) or pt.is_large_string(plain) or pt.is_string_view(plain)
    if field.name == "conversations":
        fits = _is_turns(kind)
    elif pt.is_integer(field.type):
        fits = pt.is_integer(plain)
    else:
        fits = text or (field.name == "id" and pt.is_integer(plain))
    if not fits:
        raise UserError(f"{name}: column {field.name} is {kind}; it needs {field.type}")
    return column.cast(field.type)


def _is_turns(kind: pa.DataType) -> bool:
    if not (pt.is_list(kind) or pt.is_large_list(kind)) or not pt.is_struct(kind.value_type):
        return False
    return {"from", "value"} <= {field.name for field in kind.value_type}
