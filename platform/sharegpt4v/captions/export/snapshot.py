"""What an unfinished run has so far, copied so that the export is about one moment.

The run is only read: a job may hold its lock and may compact its outcomes at any time. A snapshot during
which files went or changed is taken again.
"""

import errno
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sharegpt4v.captions.finish import finished_parts, summarise
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import outcome_files
from sharegpt4v.captions.settle import Counts, settled_shards, write_parts
from sharegpt4v.errors import UserError

TRIES = 10
SECONDS_BETWEEN = 1.0
"""Moving compacted parts into place takes seconds, then the run is quiet."""

Identities = dict[Path, tuple[int, int]]
"""Inode and modification time in nanoseconds of each file."""


def take_snapshot(run: CaptionRun, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Fills an empty folder with captions/, manifest/ and summary.json, and returns what the latter holds.

    Duplicates are settled as the finish step would. `rows` of the summary counts the manifest, `captions` and
    `rejects` what is done. facts: those of the run that a summary holds.
    Raises UserError when the run does not hold still.
    """
    for _ in range(TRIES):
        try:
            kept, committed = _identities(run)
            counts, rows = _settle(run, folder)
            kept_now, committed_now = _identities(run)
        except OSError as error:
            if not _file_is_gone(error):
                raise
        else:
            if kept_now == kept and committed.items() <= committed_now.items():
                return _complete(run, folder, counts, facts | {"rows": rows})
        time.sleep(SECONDS_BETWEEN)
    raise UserError(
        f"{run.path} changed each of the {TRIES} times it was read: wait until its command has ended, then "
        f"export again"
    )


def _file_is_gone(error: OSError) -> bool:
    # pyarrow raises FileNotFoundError without a number; a network file system may say ESTALE instead.
    return isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE


def _identities(run: CaptionRun) -> tuple[Identities, Identities]:
    """Returns those of finished parts, which only compacting changes, and of outcomes, which a job adds."""
    kept = [path for folder in finished_parts(run) for path in folder.glob("*.parquet")]
    return _identified(kept), _identified(outcome_files(run))


def _identified(paths: Iterable[Path]) -> Identities:
    return {path: (found.st_ino, found.st_mtime_ns) for path in paths for found in [path.stat()]}


def _settle(run: CaptionRun, folder: Path) -> tuple[Counts, int]:
    copied = CaptionRun(folder)
    for part in (copied.captions, copied.rejects):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    counts, rows = Counts(), 0
    for shard in settled_shards(run, *finished_parts(run)):
        counts.add(shard)
        rows += shard.rows
        write_parts(shard, copied.captions, copied.rejects)
    return counts, rows


def _complete(run: CaptionRun, folder: Path, counts: Counts, facts: dict[str, Any]) -> dict[str, Any]:
    copied = CaptionRun(folder)
    copied.manifest.symlink_to(run.manifest.absolute())  # a run's manifest grows, and never shrinks
    copied.sessions.mkdir(parents=True)
    for session in run.sessions.glob("*.json"):
        shutil.copy2(session, copied.sessions)
    return summarise(copied, counts, [], facts, started=time.time())
