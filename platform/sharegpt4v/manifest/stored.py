"""Whether a manifest that was normalised before still is what its input says, without reading that again."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from sharegpt4v.atomic import make_folder, write_atomic
from sharegpt4v.credentials import all_without_credentials
from sharegpt4v.manifest.locate import Located
from sharegpt4v.manifest.writer import shards

VERSION = 1
"""Raise it where the same input gives other rows than before: stored manifests are then read again."""

SETTLED_SECONDS = 2.0
"""What changed later than this before it is looked at may change again in the same tick of its clock."""

_REMOTE = frozenset(
    "blob_id content-md5 content_hash digest etag generation last-modified last_modified lastmodified "
    "md5hash mtime updated".split()
)
"""What fsspec's file systems call that which changes with an object's content, in lower case."""

Identity = list[str]


def identity(fs: fsspec.AbstractFileSystem, path: str) -> Identity | None:
    """Returns what changes with a file, or with the entries of a local folder; None where nothing does.

    Local: size, times and inode. Behind a URI: size, and etag or time of change.
    """
    if isinstance(fs, LocalFileSystem):
        found = os.stat(path)
        if max(found.st_mtime, found.st_ctime) > time.time() - SETTLED_SECONDS:
            return None
        return [str(n) for n in (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)]
    info = fs.info(path)
    changing = [f"{key}={info[key]}" for key in sorted(info) if key.lower() in _REMOTE and info[key]]
    return [str(info.get("size")), *changing] if changing and info.get("type") == "file" else None


def note(located: Located, path: str) -> None:
    """Notes a file or folder of the input just before it is read: a change while it is read shows as well."""
    try:
        located.seen[path] = identity(located.fs, path)
    except OSError:  # reading it will say what is wrong
        located.seen[path] = None


def keep(
    record: Path, asked: Mapping[str, Any], located: Located, folder: Path, facts: Mapping[str, Any]
) -> None:
    """Writes down what a manifest was made of, beside it; nothing where a change of it would not show.

    asked: the arguments that decide the rows. folder: of the manifest's shards. facts: what reuse() returns.
    """
    known = {
        "version": VERSION,
        "asked": dict(asked),
        "files": list(located.files),
        "seen": located.seen,
        "shards": _shards(folder),
        "facts": dict(facts),
    }
    # What credentials are part of cannot be looked at without them, and they are not kept.
    if None in located.seen.values() or all_without_credentials(known) != known:
        record.unlink(missing_ok=True)
        return
    make_folder(record.parent)
    write_atomic(record, json.dumps(known))


def reuse(record: Path, asked: Mapping[str, Any], located: Located, folder: Path) -> dict[str, Any] | None:
    """Returns the facts that keep() wrote, or None where the input, the arguments or the shards differ."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        before = (known["version"], known["asked"], known["files"])
        if before != (VERSION, dict(asked), list(located.files)) or known["shards"] != _shards(folder):
            return None
        if any(identity(located.fs, path) != seen for path, seen in known["seen"].items()):
            return None
        facts = known["facts"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one of another version
        return None
    return facts if isinstance(facts, dict) else None


def _shards(folder: Path) -> list[list[Any]]:
    return [[shard.name, shard.stat().st_size, pq.read_metadata(shard).num_rows] for shard in shards(folder)]
