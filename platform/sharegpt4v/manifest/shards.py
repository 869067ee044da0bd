"""WebDataset tar shards as a manifest: where in which shard each image's bytes lie."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.json_files import record_batch
from sharegpt4v.manifest.locate import is_hidden, is_image
from sharegpt4v.manifest.rows import BATCH_ROWS

GZIP = b"\x1f\x8b"
SIDECAR_KEYS = ("id", "source", "conversations")
SIDECAR_BYTES = 16 << 20  # a sidecar is one record; a larger file is something else


@dataclass
class _Group:
    """The members that share a key: one sample."""

    key: str
    images: list[tarfile.TarInfo] = field(default_factory=list)
    sidecar: dict[str, Any] = field(default_factory=dict)


def read_shard(file: IO[bytes], container: str, name: str) -> Iterator[pa.RecordBatch]:
    """Yields RAW batches of one shard. container: its path below the root, as rows will carry it.

    Members whose names agree up to the first dot belong together: one image, and a .json with id, source or
    conversations where there is one. Raises UserError for a shard that is compressed, cut or damaged, and for
    two images under one key.
    """
    if file.read(2) == GZIP:
        raise UserError(f"{name} is compressed, so images in it cannot be found by range: gunzip it first")
    file.seek(0)
    rows = (_row(group, container) for group in _groups(file, name) if _pictured(group, name))
    first = 1
    while part := list(islice(rows, BATCH_ROWS)):
        yield record_batch(part, name, first)
        first += len(part)


def _groups(file: IO[bytes], name: str) -> Iterator[_Group]:
    group = _Group("")
    for tar, member in _members(file, name):
        key = _key(member.name)
        if key != group.key:
            yield group
            group = _Group(key)
        if is_image(member.name):
            group.images.append(member)
        elif member.name.endswith(".json"):
            group.sidecar = _sidecar(tar, member, name)
    yield group


def _members(file: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields plain visible files in the shard's order; only headers are read."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not is_hidden(member.name.removeprefix("./")):
                    yield tar, member
                vars(tar)["members"].clear()  # tarfile would keep every header: 1 KB a member
            _require_end(file, tar.offset, name)
    except tarfile.TarError as error:
        raise UserError(f"{name} is not a whole tar file ({error}): copy or download it again") from error


def _require_end(file: IO[bytes], offset: int, name: str) -> None:
    """Raises UserError at a damaged header, which tarfile takes for the end and silently drops the rest."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise UserError(f"{name} is damaged at byte {offset}: copy or download it again")


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


def _pictured(group: _Group, name: str) -> bool:
    if len(group.images) > 1:
        names = ", ".join(member.name for member in group.images[:3])
        raise UserError(
            f"{name}: key {group.key} has {len(group.images)} images ({names}); give each its own key"
        )
    return bool(group.images)


def _row(group: _Group, container: str) -> dict[str, Any]:
    member = group.images[0]
    return {
        **group.sidecar,
        "image": member.name,
        "container": container,
        "offset": member.offset_data,
        "size": member.size,
    }
