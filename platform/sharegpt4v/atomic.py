"""Files and folders that have their name only once they are whole, and still after a power cut.

Everything is written beside its place, synced, renamed, and the rename is synced: whatever is deleted
afterwards because the new file exists cannot outlive it on the disk. A killed process leaves at most a
hidden file or folder `.NAME.<16 hex digits>`, which no reader looks at.
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
    """Writes a file whole or not at all; text as UTF-8. Raises OSError, the old file is then as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` where the block makes a file or folder, which takes the name at its end.

    A file replaces an older file; a folder replaces nothing but an empty folder. When the block fails, what
    it made is removed and `path` is as before. The name is new each time, so that several processes, also on
    several nodes, may write one `path`: the last one wins. Raises OSError, also where the parent is missing.
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
    """Gives a finished file or folder its name, for good: synced before, and its folder after.

    Both paths are on one file system. Raises OSError where `path` is a folder that is not empty.
    """
    sync(temporary)
    temporary.rename(path)
    _sync_folder(path.parent)


def sync(path: Path) -> None:
    """Returns once a file, or a folder with all that is in it, is on the disk. Links are not followed."""
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
