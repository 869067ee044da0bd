"""Writes files and folders that get their name only once complete, and keep it after a power cut.

Each is written under a temporary name beside its path, synced and renamed, and the rename is synced: so
after a power cut nothing that was deleted because the new file existed is lost without it. A killed process
leaves at most a hidden file or folder `.NAME.<16 hex digits>`, which no reader opens.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDERS_NOT_SYNCED = {errno.EINVAL, errno.ENOTSUP}
"""Errors of file systems that sync files but refuse to sync a folder, SMB and some FUSE mounts among them."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all; text as UTF-8. Raises OSError and then keeps the old file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` for the block to write; renames it to `path` after the block.

    A file replaces an older file; a folder replaces only an empty folder. When the block fails, its output
    is removed and `path` is unchanged. The temporary name is unique, so that several processes, also on
    several nodes, may write one `path`: the last rename wins. Raises OSError, also for a missing parent.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file or folder durably: syncs it before, and its parent folder after.

    Both paths are on one file system. Raises OSError where `path` is a folder that is not empty.
    """
    sync(temporary)
    temporary.rename(path)
    _sync_folder(path.parent)


def make_folder(path: Path, parents: bool = True) -> None:
    """Makes a folder where there is none, durably: what is synced inside it later is found after a power cut.

    parents: make missing parents likewise. Raises FileNotFoundError for a missing parent otherwise.
    """
    if path.is_dir():
        return
    if parents and not path.parent.is_dir():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def sync(path: Path) -> None:
    """Syncs a file, or a folder and all its content, to the disk. Links are not followed."""
    if not path.is_dir():
        _sync_file(path)
        return
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                _sync_file(file)
        _sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    try:
        _sync_file(path)
    except OSError as error:
        if error.errno not in _FOLDERS_NOT_SYNCED:
            raise
