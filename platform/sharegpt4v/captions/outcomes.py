"""What sessions commit: Parquet files below work/outcomes, a folder for each session.

A file gets its name only when it is complete. One that a power cut tore cannot be read, since Parquet
ends with its footer: it is passed over, and its images are done again.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sharegpt4v.atomic import atomic_path
from sharegpt4v.captions.layout import CaptionRun


def commit_outcomes(outcomes: pa.Table, folder: Path) -> Path:
    """Writes a table of records.OUTCOMES into a session's folder, completely or not at all.

    Named by its first image and its length: the same rows again, from a call that was repeated, take the
    place of the first, and no others do. Raises OSError, also where there is no `folder`: it is never made.
    """
    shard, row = outcomes["shard"][0].as_py(), outcomes["row"][0].as_py()
    path = folder / f"{shard:05}-{row:09}-{len(outcomes):06}.parquet"
    with atomic_path(path) as temporary:
        pq.write_table(outcomes, temporary)
    return path


def outcome_files(run: CaptionRun) -> Iterator[Path]:
    """Returns the readable files of all sessions, oldest first; others stay where they are."""
    for path in sorted(run.outcomes.glob("*/*.parquet")):
        try:
            pq.read_metadata(path)
        except pa.ArrowInvalid:
            continue
        yield path
