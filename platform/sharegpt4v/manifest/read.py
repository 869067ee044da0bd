"""Read any manifest as one stream of rows, whatever format holds it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, TypedDict

import pyarrow as pa

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.image_folder import read_folder
from sharegpt4v.manifest.json_files import read_json
from sharegpt4v.manifest.locate import (
    JSON_SUFFIXES,
    KINDS,
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
    TAR_UNPACKERS,
    Located,
    filesystem,
    locate,
    store_answers,
    suffix,
)
from sharegpt4v.manifest.parquet import read_parquet
from sharegpt4v.manifest.rows import complete
from sharegpt4v.manifest.shards import read_shard
from sharegpt4v.manifest.stored import note

Turn = TypedDict("Turn", {"from": str, "value": str})


class ManifestRow(TypedDict):
    """One row of records.MANIFEST; image is None for a record without one (a text-only conversation)."""

    id: str
    image: str | None
    source: str
    container: str
    offset: int
    size: int
    conversations: list[Turn] | None


def read_rows(path: str, root: str | None = None) -> Iterator[ManifestRow]:
    """Yields the rows of any manifest, in order, ids unchecked; memory stays flat.

    path: a folder of images, a JSON array, JSONL, Parquet, tar shards, a glob of such files; local or a URI.
    root: where image paths start; by default the folder itself, or the one that holds the manifest.
    Raises UserError (one line, with the record) for what cannot be read as a manifest, RunFailed where the
    storage fails.
    """
    for batch in read_batches(locate(path, root)):
        yield from batch.to_pylist()


def read_batches(
    located: Located, source: str | None = None, *, text_alone: bool = False
) -> Iterator[pa.RecordBatch]:
    """Yields completed rows (rows.complete) of all that was located. source: of rows that name none.

    text_alone: files without an image are taken, as training data may be.
    """
    with store_answers(located.name), _refusing(located):
        if located.folder:
            yield from _completed(read_folder(located), located.name, source)
        for file in located.files:
            note(located, file)
            yield from _completed(_read_file(located, file, text_alone), _name(located, file), source)


@contextmanager
def _refusing(located: Located) -> Iterator[None]:
    """Raises UserError for what a user can put right on a disk."""
    try:
        yield
    except PermissionError as error:  # skipping an unreadable folder would lose images in silence
        if not located.is_local:
            raise
        raise UserError(f"{error.filename or located.name} may not be read: give this user access") from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        path = str(error.filename)
        raise UserError(
            f"{located.name} holds a folder whose path has {len(os.fsencode(path)):,} bytes, more than this "
            f"system opens: move it up (…{path[-40:]})"
        ) from error


def _completed(batches: Iterator[pa.RecordBatch], name: str, source: str | None) -> Iterator[pa.RecordBatch]:
    first = 1
    for raw in batches:
        yield complete(raw, name, first, source)
        first += raw.num_rows


def _read_file(located: Located, file: str, text_alone: bool) -> Iterator[pa.RecordBatch]:
    name = _name(located, file)
    for ending, unpacker in TAR_UNPACKERS.items():
        if file.endswith(ending):
            raise UserError(
                f"{name} is compressed, so images in it cannot be found by range: {unpacker} it first"
            )
    kind = suffix(file)
    if kind not in (*JSON_SUFFIXES, *PARQUET_SUFFIXES, *TAR_SUFFIXES):
        raise UserError(f"{name} is no manifest (suffix {kind or 'missing'}); give {KINDS}")
    if located.is_local and not os.path.isfile(file):
        raise UserError(f"{file} is a pipe, a device or a folder: write what it holds to a file")
    opened: IO[bytes] = located.fs.open(file, "rb")
    with opened:
        if kind in JSON_SUFFIXES:
            yield from read_json(opened, name, text_alone)
        elif kind in PARQUET_SUFFIXES:
            yield from read_parquet(opened, name, text_alone)
        else:
            yield from read_shard(opened, _container(located, file), name, located.ignored)


def _container(located: Located, file: str) -> str:
    """Returns the shard's path below the root, which rows carry so that a run can move with its data."""
    _, root = filesystem(located.root)
    if not PurePosixPath(file).is_relative_to(root):
        raise UserError(
            f"the shard {file} lies outside the image root {root}: leave the root away or widen it"
        )
    return str(PurePosixPath(file).relative_to(root))


def _name(located: Located, file: str) -> str:
    """Returns a file's name for messages: the user's, or its own if it comes from a folder or pattern."""
    return located.name if len(located.files) == 1 else PurePosixPath(file).name
