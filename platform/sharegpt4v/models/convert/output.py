"""The folder that a conversion writes: under another name until it is complete, by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sharegpt4v.errors import UserError

_MARK = ".sharegpt4v-convert"
"""A file in the unfinished folder: says that it is ours to clear, and is locked by the one that fills it."""


def check_out(out: Path, needed: int, sources: Iterable[Path]) -> Path:
    """Where `out` really is. needed: bytes that will be written. sources: folders that will be read.

    Raises UserError, and makes nothing, when it is not new or empty or could not be written.
    """
    out = out.resolve()
    _check_empty(out)
    for source in sources:
        if source.resolve().is_relative_to(_partial(out)):
            raise UserError(f"{source} is cleared when --out is {out}: move it, or give another --out")
    there = next(parent for parent in out.parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {there} is no folder that can be written; give another --out")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"--out {out}: {needed / 1e9:,.2f} GB will be written and {free / 1e9:,.2f} GB are free there; "
            "make room, or give another --out"
        )
    return out


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends, and goes when the block fails.

    What a killed process left there is cleared. Raises UserError when another process is writing it, or it
    holds what no conversion made.
    """
    partial = _partial(out)
    with _locked(partial, out):
        _check_empty(out)
        try:
            _clear(partial)
            yield partial
            (partial / _MARK).unlink()
        except BaseException:
            shutil.rmtree(partial)
            raise
        if out.exists():
            out.rmdir()
        partial.rename(out)


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    mark = partial / _MARK
    busy = UserError(f"another convert is writing {out}: wait for it, or give another --out")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(partial.iterdir()) and not mark.exists():
            raise UserError(
                f"{partial} is in the way, and no conversion left it; move it, or give another --out"
            )
        file = open(mark, "a")
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}; give another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            raise UserError(f"{mark} cannot be locked: {error.strerror}; give another --out") from None
        # It may have been finished, or given up, between the opening and the lock.
        if not mark.exists() or not os.path.samestat(mark.stat(), os.fstat(file.fileno())):
            raise busy
        yield


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a new folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give a new folder")


def _clear(partial: Path) -> None:
    for left in partial.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != _MARK:
            left.unlink()


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")
