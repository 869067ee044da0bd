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


def read_parquet(file: IO[bytes], name: str, text_alone: bool = False) -> Iterator[pa.RecordBatch]:
    """Yields RAW batches of one file. Columns that a manifest does not know are not read.

    text_alone: a file without the column image is taken.
    Raises UserError for a damaged file, a missing image column, and columns of a type that cannot be taken.
    """
    try:
        parquet = pq.ParquetFile(file, buffer_size=COLUMN_BUFFER, pre_buffer=False)
        schema = parquet.schema_arrow
        _require_image(schema, name, text_alone)
        first = 1
        known = [field.name for field in RAW if field.name in schema.names]
        for batch in parquet.iter_batches(BATCH_ROWS, columns=known, use_threads=False):
            yield _raw(batch, name, first)
            first += batch.num_rows
    # Of broken files Arrow raises all of these; a column's own name may be no UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} is not a whole Parquet file: {reason}") from error


def stream_columns(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields some columns of a Parquet file of our own, in batches; memory stays flat for any size.

    Raises UserError that names a damaged file.
    """
    try:
        with pq.ParquetFile(path, buffer_size=COLUMN_BUFFER, pre_buffer=False) as parquet:
            # Threads would each keep an arena of freed buffers: 100 MB more for a million rows, no faster.
            yield from parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the storage failed; pyarrow reports damaged content as an OSError without a number
        raise UserError(f"{path} is damaged: restore it, then give the run's command again") from error


def _require_image(schema: pa.Schema, name: str, text_alone: bool) -> None:
    for known in RAW.names:
        if (count := schema.names.count(known)) > 1:
            raise UserError(f"{name} has {count} columns {known}: keep one, and give the others other names")
    if "image" in schema.names or text_alone:
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
        columns.append(_cast(column, field, name, first))
    return pa.RecordBatch.from_arrays(columns, schema=RAW)


def _cast(column: pa.Array, field: pa.Field, name: str, first: int) -> pa.Array:
    """Returns the column in the type of `field`. first: the number of its first record, for messages."""
    kind = column.type
    if not _fits(kind, field):
        raise UserError(f"{name}: column {field.name} is {kind}; it needs {field.type}")
    if pt.is_dictionary(kind):
        column = column.dictionary_decode()
    if problem := _problem(column, field):
        # Arrow does not say which record it was. A slice would be checked with all its neighbours.
        row = next(row for row in range(len(column)) if _problem(column.take([row]), field))
        raise UserError(f"{name}: record {first + row} has {problem} in column {field.name}")
    return column.cast(field.type)


def _problem(column: pa.Array, field: pa.Field) -> str | None:
    """Returns what keeps a column of a fitting type from being used: Parquet holds text unchecked."""
    try:
        column.validate(full=True)
        column.cast(field.type)
    except pa.ArrowInvalid as error:
        return "text that is not UTF-8" if "UTF8" in str(error) else f"a value out of range ({error})"
    return None


def _fits(kind: pa.DataType, field: pa.Field) -> bool:
    if kind == field.type or pt.is_null(kind):
        return True
    if field.name == "conversations":
        return _is_turns(kind)
    plain = kind.value_type if pt.is_dictionary(kind) else kind
    if pt.is_integer(field.type):
        return bool(pt.is_integer(plain))
    return _is_text(kind) or (field.name == "id" and bool(pt.is_integer(plain)))


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pt.is_dictionary(kind) else kind
    return bool(pt.is_string(plain) or pt.is_large_string(plain) or pt.is_string_view(plain))


def _is_turns(kind: pa.DataType) -> bool:
    if not (pt.is_list(kind) or pt.is_large_list(kind)) or not pt.is_struct(kind.value_type):
        return False
    fields = list(kind.value_type)
    texts = [field.name for field in fields if _is_text(field.type) or pt.is_null(field.type)]
    return texts.count("from") == texts.count("value") == 1
