"""What sessions commit: Parquet files below work/outcomes, a folder for each session and manifest shard.

A file gets its name only when it is complete. One that the disk damaged later cannot be read, or fails its
pages' checksums: it is passed over, and its images are done again.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sharegpt4v.atomic import atomic_path, make_folder
from sharegpt4v.captions.layout import CaptionRun

SET_ASIDE = ".unreadable"
"""Ends the name of a file that could not be read; it goes with work/outcomes once all images are done."""


def commit_outcomes(outcomes: pa.Table, folder: Path) -> Path:
    """Writes a table of records.OUTCOMES into a session's folder, completely or not at all.

    Named by its first image and its length: the same rows again, from a call that was repeated, take the
    place of the first, and no others do. Raises OSError, also where there is no `folder`: it is never made.
    """
    path = _path(outcomes, folder)
    make_folder(path.parent, parents=False)
    with atomic_path(path) as temporary:
        pq.write_table(outcomes, temporary, write_page_checksum=True)
    return path


def read_committed(rows: pa.Table, folder: Path) -> pa.Table | None:
    """Returns what a session has committed of just these rows, given by their columns shard, row and id."""
    path = _path(rows, folder)
    if not path.exists():
        return None
    known = read_outcomes(path)
    same = known is not None and all(known[name].equals(rows[name]) for name in ("shard", "row", "id"))
    return known if same else None


def _path(rows: pa.Table, folder: Path) -> Path:
    shard, row = rows["shard"][0].as_py(), rows["row"][0].as_py()
    # One folder for each manifest shard: a million images are 20,000 files.
    return folder / f"{shard:05}" / f"{shard:05}-{row:09}-{len(rows):06}.parquet"


def outcome_files(run: CaptionRun) -> list[Path]:
    """Returns the files of all sessions, oldest session first, whether they can be read or not."""
    # Runs begun by an earlier version have them in their session's folder itself.
    found = [path for below in ("*/*.parquet", "*/*/*.parquet") for path in run.outcomes.glob(below)]
    return sorted(found, key=lambda path: (session_of(run, path), path.name))


def session_of(run: CaptionRun, path: Path) -> int:
    """Returns the number of the session that committed a file."""
    return int(path.relative_to(run.outcomes).parts[0])


def read_outcomes(path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """Reads a whole file, or some columns, and returns None where the content is damaged.

    Raises OSError where the storage fails: that says nothing of the content.
    """
    content = pa.py_buffer(path.read_bytes())
    try:
        file = pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True)
        # A file is small: threads for its columns cost more than they save.
        table = file.read(columns, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError):  # pyarrow reports damaged pages and footers as OSError, too
        return None
    return table


def set_aside(paths: Iterable[Path]) -> None:
    """Renames damaged files, so that no later step meets them. The caller holds the run's lock."""
    for path in paths:
        path.rename(path.with_name(path.name + SET_ASIDE))
