"""WebDataset tar shards as a manifest: where in which shard each image's bytes lie."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.json_files import record_batch
from sharegpt4v.manifest.locate import is_image, suffix
from sharegpt4v.manifest.rows import BATCH_ROWS
from sharegpt4v.manifest.tar_members import plain_members

SIDECAR_KEYS = ("id", "source", "conversations")
SIDECAR_BYTES = 16 << 20  # a sidecar is one record; a larger file is something else


@dataclass
class _Group:
    """The members of one archive that share a key: one sample."""

    tar: tarfile.TarFile
    key: str
    images: list[tarfile.TarInfo] = field(default_factory=list)
    records: list[tarfile.TarInfo] = field(default_factory=list)


def read_shard(file: IO[bytes], container: str, name: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
    """Yields RAW batches of one shard. container: its path below the root, as rows will carry it.

    Neighbours whose names agree up to the first dot belong together: one image, and a .json with id, source
    or conversations where there is one. Every other member is counted in `ignored`. A path that is absolute
    or holds `..` becomes a row, which ImageReader refuses. Raises UserError for a shard that is compressed,
    cut or damaged, for sparse images, and for two images under one key.
    """
    rows = (
        _row(group, container, name) for group in _groups(file, name, ignored) if _used(group, name, ignored)
    )
    first = 1
    while part := list(islice(rows, BATCH_ROWS)):
        yield record_batch(part, name, first)
        first += len(part)


def _groups(file: IO[bytes], name: str, ignored: Counter[str]) -> Iterator[_Group]:
    group: _Group | None = None
    for tar, member in plain_members(file, name, ignored):
        key = _key(member.name)
        if group is None or key != group.key or tar is not group.tar:
            if group is not None:
                yield group
            group = _Group(tar, key)
        if is_image(member.name):
            _refuse_sparse(member, name)
            group.images.append(member)
        elif suffix(member.name) == ".json":
            group.records.append(member)
        else:
            ignored[suffix(member.name) or "no suffix"] += 1
    if group is not None:
        yield group


def _refuse_sparse(member: tarfile.TarInfo, name: str) -> None:
    if member.issparse():
        raise UserError(
            f"{name}: {member.name} is stored sparse, so its bytes cannot be found by range: write the "
            "archive again without a sparse option"
        )


def _key(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _sidecar(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> dict[str, Any]:
    if member.size > SIDECAR_BYTES:
        raise UserError(
            f"{name}: {member.name} has {member.size} bytes, the limit for one record is {SIDECAR_BYTES}"
        )
    content = tar.extractfile(member)
    assert content is not None  # only links and folders have none
    try:
        record = json.loads(content.read())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {member.name} is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{name}: {member.name} is {type(record).__name__}, not an object")
    return {key: record[key] for key in SIDECAR_KEYS if key in record}


def _used(group: _Group, name: str, ignored: Counter[str]) -> bool:
    """Returns whether a group has its image, and counts the .json members that belong to none."""
    if len(group.images) > 1:
        names = ", ".join(member.name for member in group.images[:3])
        raise UserError(
            f"{name}: key {group.key} has {len(group.images)} images ({names}); give each its own key"
        )
    unused = len(group.records) - (1 if group.images and group.records else 0)
    if unused:
        ignored["sidecars apart from their image in archives"] += unused
    return bool(group.images)


def _row(group: _Group, container: str, name: str) -> dict[str, Any]:
    member = group.images[0]
    # Of a.json and a.meta.json the first is the sidecar, in whichever order they come.
    record = min(group.records, key=lambda found: len(found.name), default=None)
    return {
        **(_sidecar(group.tar, record, name) if record else {}),
        "image": member.name,
        "container": container,
        "offset": member.offset_data,
        "size": member.size,
    }
