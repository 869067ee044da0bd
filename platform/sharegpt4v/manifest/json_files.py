"""JSON manifests: one array, as the released caption files have it, or one object a line."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.json_array import array_records, describe_mistake
from sharegpt4v.manifest.rows import RAW, refuse_type

Record = dict[str, Any]

BATCH_ROWS = 2048
"""Records parsed at a time; with a detailed caption each, as Python objects they take about 5 MB."""

UTF8_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
NEEDS = {
    "id": "text or a whole number",
    "image": "a path as text",
    "source": "text",
    "container": "a path as text",
    "offset": "a whole number of bytes",
    "size": "a whole number of bytes",
    "conversations": 'a list of {"from": text, "value": text}',
}


def read_json(file: IO[bytes], name: str, text_alone: bool = False) -> Iterator[pa.RecordBatch]:
    """Yields RAW batches of one file, an array if its first character is `[`. Memory stays flat for any size.

    A byte-order mark is passed over, unknown keys are ignored, whole numbers as ids become text. Lone
    surrogates are refused in ids and paths and become U+FFFD in conversations. Raises UserError with the
    record or line number for all else that a manifest cannot take.

    text_alone: a file without a single image is taken.
    """
    start = file.read(4096)
    if start.startswith(UTF16_MARKS):
        raise UserError(f"{name} is UTF-16 or UTF-32 text: save it as UTF-8")
    if start.startswith(GZIP):
        raise UserError(f"{name} is compressed: gunzip it first")
    mark = len(UTF8_MARK) if start.startswith(UTF8_MARK) else 0
    file.seek(mark)
    is_array = start[mark:].lstrip().startswith(b"[")
    records = array_records(file, name) if is_array else _line_records(file, name)
    yield from _batches(records, name, text_alone)


def _line_records(file: IO[bytes], name: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            half = "; the file ends there, half-written: remove that line" if _is_half(error, line) else ""
            reason = describe_mistake(error)
            raise UserError(f"{name}: line {number} is not valid JSON ({reason}){half}") from error


def _is_half(error: Exception, line: bytes) -> bool:
    """Returns whether a line without its end was found to stop too soon."""
    if line.endswith(b"\n") or not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or not error.doc[error.pos :].strip()


def _batches(records: Iterator[Any], name: str, text_alone: bool) -> Iterator[pa.RecordBatch]:
    first, pictured, keys = 1, 0, ""
    while rows := list(islice(records, BATCH_ROWS)):
        for number, row in enumerate(rows, start=first):
            if not isinstance(row, dict):
                raise UserError(
                    f"{name}: record {number} is {type(row).__name__}, not an object with an image"
                )
        batch = record_batch(rows, name, first)
        pictured += len(rows) - batch["image"].null_count
        keys = keys or ", ".join(list(rows[0])[:10])
        first += len(rows)
        yield batch
    if first > 1 and not pictured and not text_alone:
        raise UserError(f"{name} has no column image: its records have {keys or 'no keys'}")


def record_batch(rows: list[Record], name: str, first: int) -> pa.RecordBatch:
    """Returns a RAW batch of parsed records. first: the number of the first one, for messages."""
    return pa.RecordBatch.from_arrays([_column(rows, field, name, first) for field in RAW], schema=RAW)


def _column(rows: list[Record], field: pa.Field, name: str, first: int) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if field.name == "id" and None in values:
        for number, row in enumerate(rows, start=first):
            if row.get("id", "") is None:  # a missing key is legal; null is a sign of a broken export
                refuse_type(name, number, "id", None, NEEDS["id"])
    try:
        return pa.array(values, field.type)
    except (pa.ArrowTypeError, pa.ArrowInvalid, UnicodeEncodeError, OverflowError):
        repaired = [_repair(value, field.name, name, n) for n, value in enumerate(values, start=first)]
        return pa.array(repaired, field.type)


def _repair(value: Any, column: str, name: str, record: int) -> Any:
    """Returns the value in its column's type. Raises UserError that names the record."""
    if value is None:
        return None
    if column == "conversations":
        return _turns(value, name, record)
    if column in ("offset", "size"):
        if type(value) is int and -1 <= value < 2**63:
            return value
    elif column == "id" and type(value) is int:
        return str(value)
    elif isinstance(value, str):
        if value.isprintable() or _without_surrogates(value) == value:
            return value
        refuse_type(name, record, column, value, "text without lone surrogates")
    refuse_type(name, record, column, value, NEEDS[column])


def _turns(value: Any, name: str, record: int) -> list[Record]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        refuse_type(name, record, "conversations", value, NEEDS["conversations"])
    turns = []
    for turn in value:
        pair = {key: turn.get(key) for key in ("from", "value")}
        if not all(text is None or isinstance(text, str) for text in pair.values()):
            refuse_type(name, record, "conversations", value, NEEDS["conversations"])
        turns.append({key: text and _without_surrogates(text) for key, text in pair.items()})
    return turns


def _without_surrogates(text: str) -> str:
    """Replaces lone surrogates (halves of a character, which UTF-8 cannot hold) by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
