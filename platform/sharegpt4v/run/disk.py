"""A full disk, said in one line that names what could not be written and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharegpt4v.errors import RunFailed

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk, or of a user's share of it, that is full."""


@contextmanager
def full_disk_named(path: Path, advice: str = "") -> Iterator[None]:
    """Raises RunFailed where the block finds the disk full; other errors pass.

    path: what the block writes. Most errors of a full disk name no file; one that does is about that file.
    advice: what to do once space is free again, where no other message says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        line = f"the disk is full: {error.filename or path} cannot be written; free some space there, or move"
        line += " it to a larger disk"
        raise RunFailed(f"{line}; {advice}" if advice else line) from error
