"""One run folder, one driver: a lock that the operating system drops when its holder dies."""

import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from sharegpt4v.errors import UserError
from sharegpt4v.run.disk import FULL

LOCK_FILE = "lock.json"
"""In the run folder: locked, and names the last process that held it. It stays when the run ends."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""Errors of storage without locks: NFS without its lock daemon, Lustre mounted noflock, some FUSE mounts."""

log = logging.getLogger(__name__)


class RunLock:
    """Context manager that keeps a run folder for this process, with flock through filelock.

    The lock ends with the process, even after kill -9; a forked child does not inherit it. Nodes see each
    other's locks on NFS, CephFS and Lustre mounted with flock; with local_lock, nolock or localflock
    every node sees its own alone. On storage without locks a warning is logged and the run goes on
    unguarded: a second run there costs work, and money where captions are paid for.
    Raises UserError when another run holds the folder, naming it, and when the lock file cannot be written;
    OSError when the disk is full.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK_FILE
        # No marker file in place of a lock that the storage lacks: it would outlive a kill.
        # Not per thread: any thread that leaves the block releases the lock.
        self._lock = FileLock(
            self._path,
            blocking=False,
            thread_local=False,
            fallback_to_soft=False,
            preserve_lock_file=True,
            on_acquired=_write_holder,
        )

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except Timeout:  # before OSError, which it is as well
            raise UserError(
                f"{self._path.parent} is in use by another run ({_holder(self._path)}): "
                f"wait for it, or give another folder",
                field="out",
            ) from None
        except OSError as error:
            if error.errno in FULL:
                raise
            if error.errno not in _NO_LOCKS:
                raise UserError(
                    f"cannot lock {self._path} ({error.strerror}): make it writable, or give another folder",
                    field="out",
                ) from None
            log.warning(
                "%s has no file locks (%s): make sure yourself that no second run uses %s",
                self._path.parent,
                error.strerror,
                self._path.parent,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()  # does nothing where there was no lock to take


def _write_holder(descriptor: int) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(path: Path) -> str:
    """Returns the process that the lock file names, for messages."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):  # OSError: SMB locks keep others from reading, too
        return "it has not written its name yet"
