"""The folder that a conversion writes: under another name until it is complete, by one process at a time."""

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from sharegpt4v.atomic import publish
from sharegpt4v.errors import UserError

_MARK = ".sharegpt4v-convert"
"""A file in the unfinished folder: says that it is ours to clear, and is locked by the one that fills it."""


def check_out(out: Path, needed: int, sources: Iterable[Path]) -> Path:
    """Resolves `out`. needed: bytes that will be written. sources: folders that will be read.

    Raises UserError, and makes nothing, when it is not new or empty or could not be written.
    """
    try:
        out = out.resolve()
        _check_empty(out)
        _check_ours(_partial(out))
        there = next(parent for parent in out.parents if parent.exists())
        free = shutil.disk_usage(there).free + _left(_partial(out))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{out}: {reason}; give another folder", field="out") from None
    for source in sources:
        if source.resolve().is_relative_to(_partial(out)):
            raise UserError(
                f"{source} is cleared when this is {out}: move it, or give another folder", field="out"
            )
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {there} is no folder that can be written; give another", field="out")
    if out.is_mount() or out == Path.cwd():
        raise UserError(
            f"{out} cannot be replaced while it is mounted or worked in; give one inside it", field="out"
        )
    if free < needed:
        raise UserError(
            f"{out}: {needed / 1e9:,.2f} GB will be written and {free / 1e9:,.2f} GB are free there; "
            "make room, or give another folder",
            field="out",
        )
    return out


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Yields a new folder beside `out`, renamed to it when the block ends and removed when the block fails.

    What a killed process left there is cleared. Raises UserError when another process is writing it, or it
    holds what no conversion made.
    """
    partial = _partial(out)
    with _locked(partial, out):
        try:
            _check_empty(out)
            _clear(partial)
            yield partial
            if out.exists():
                partial.chmod(stat.S_IMODE(out.stat().st_mode))
                out.rmdir()
            publish(partial, out)  # with its mark: whoever opens it now finds it locked
        except BaseException:
            if partial.exists():
                _clear(partial)
                (partial / _MARK).unlink()
                partial.rmdir()
            raise
        (out / _MARK).unlink()


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    mark = partial / _MARK
    busy = UserError(f"another convert is writing {out}: wait for it, or give another folder", field="out")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _check_ours(partial)
        # Never made where one was seen: the folder may have got its name since, and is complete then.
        file = open(mark, "r+" if mark.exists() else "a")
    except FileNotFoundError:
        raise busy from None
    except OSError as error:
        raise UserError(
            f"cannot write {partial}: {error.strerror}; give another folder", field="out"
        ) from None
    with file:
        try:
            if not lock_descriptor(file.fileno(), blocking=False):
                raise busy
        except OSError as error:
            raise UserError(
                f"cannot lock {mark}: {error.strerror}; give another folder", field="out"
            ) from None
        # It may have been finished, or given up, between the opening and the lock.
        if not mark.exists() or not os.path.samestat(mark.stat(), os.fstat(file.fileno())):
            raise busy
        yield


def _check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new folder", field="out")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder", field="out")


def _check_ours(partial: Path) -> None:
    if not partial.exists() or (partial / _MARK).exists():
        return
    if not partial.is_dir() or any(partial.iterdir()):
        raise UserError(
            f"{partial} is in the way, and no conversion left it; move it, or give another folder",
            field="out",
        )


def _left(partial: Path) -> int:
    """Returns the bytes that clearing will free."""
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _clear(partial: Path) -> None:
    for left in partial.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != _MARK:
            left.unlink()


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")
