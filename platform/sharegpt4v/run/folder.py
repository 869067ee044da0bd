"""The folder of one run of any job: what every job finds in it, and whether it may be written."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sharegpt4v.errors import UserError
from sharegpt4v.run.lock import LOCK_FILE

_PROBE = ".probe-"
"""Begins the name of a file that is made to see whether a folder can be written; a kill may leave one, which
the next command removes."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. `path` is a local or shared folder; `open` refuses URIs."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Creates the folder if needed. Raises UserError when it cannot be written or is something else."""
        make_writable(path)
        refuse_other_files(path)
        return cls(path.absolute())

    @property
    def settings(self) -> Path:
        return self.path / "run.yaml"

    @property
    def work(self) -> Path:
        """Whatever a resume needs; not for readers."""
        return self.path / "work"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def success(self) -> Path:
        """An empty file, written last of all."""
        return self.path / "_SUCCESS"


def refuse_other_files(path: Path) -> None:
    """Raises UserError for a URI, and for a folder that holds files and is no run's. Writes nothing."""
    _refuse_uri(path)
    if not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(_PROBE)}
    if names and not names & {"run.yaml", LOCK_FILE}:  # a run's first file is its lock
        raise UserError(
            f"{path} holds other files ({sorted(names)[0]}, ...): give an empty or new folder", field="out"
        )


def make_writable(path: Path) -> None:
    """Creates an output folder where needed, and sweeps what killed commands left of this.

    Raises UserError for a URI and for a folder that cannot be written.
    """
    _refuse_uri(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # access() reports everything as writable to root, so only a real write shows it.
        probe = path / f"{_PROBE}{os.getpid()}"
        probe.touch()
        # Those of killed commands, too; another command's that is under way has served once it is made.
        for left in path.glob(f"{_PROBE}*"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror}; give another folder", field="out"
        ) from None


def _refuse_uri(path: Path) -> None:
    if "://" in str(path) or ":/" in str(path):
        raise UserError(f"{path} is a URI: it must be a local or shared folder", field="out")
