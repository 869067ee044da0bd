"""One run folder, one driver: a lock that the operating system drops when its holder dies."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from sharegpt4v.errors import UserError


class RunLock:
    """Context manager over `<run>/lock.json`, locked with flock.

    The lock goes with the process, even after kill -9, so no lock is ever stale; the file's text only
    says who holds it. On network storage flock must be supported (NFSv4, Lustre, CephFS are).
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "lock.json"
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        file = open(self._path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = _describe(file.read())
            file.close()
            raise UserError(
                f"{self._path.parent} is in use by another run ({holder}): wait for it, or give another --out"
            ) from None
        except OSError as error:
            file.close()
            raise UserError(
                f"{self._path} cannot be locked ({error.strerror}): put --out on storage with file locks"
            ) from None
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}, file)
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        # The file stays: removing it would let two processes lock two different files of this name.
        self._file.close()


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "its holder is still writing its name"
