"""What a session is to do, in files of its own: one row group for each block, which is a few commits."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sharegpt4v.atomic import make_folder
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.parts import read_part
from sharegpt4v.captions.resume import Done
from sharegpt4v.records import MANIFEST, PENDING

BLOCK_BYTES = 112 << 20
"""Of pixels in one block; Ray Data means blocks to be of 128 MiB at most."""

FEW_BLOCKS = 256
"""Blocks that a run has at least, as long as it has so many commits: workers end together, progress shows."""

LEAD = 32
"""Commits that have a block of their own at the beginning: the first one need not wait for others."""


def write_pending(run: CaptionRun, done: Done, commit_rows: int, block_rows: int) -> list[Path]:
    """Writes what is not done as records.PENDING, one row group for each block of at most block_rows.

    The files are below a folder whose name was never used before: a worker that outlived its session finds
    its own files gone, never others under their names. Returns them; none means that all is done.
    """
    shutil.rmtree(run.pending, ignore_errors=True)
    folder = run.pending / secrets.token_hex(8)
    make_folder(folder)
    written: list[Path] = []
    columns = [name for name in PENDING.names if name in MANIFEST.names]
    for number, (path, flags) in enumerate(zip(run.shards(), done, strict=True)):
        rows = np.flatnonzero(~flags)
        if len(rows) == 0:
            continue
        left = read_part(path, columns).take(pa.array(rows))
        left = left.add_column(0, PENDING.field("row"), pa.array(rows, pa.int32()))
        left = left.add_column(0, PENDING.field("shard"), pa.array(np.full(len(rows), number, np.int32)))
        target = folder / path.name
        lead = 0 if written else LEAD * commit_rows
        with pq.ParquetWriter(target, PENDING) as file:
            for part, size in ((left.slice(0, lead), commit_rows), (left.slice(lead), block_rows)):
                if len(part):
                    file.write_table(part.cast(PENDING), row_group_size=size)
        written.append(target)
    return written


def row_groups(files: Sequence[Path]) -> list[dict[str, str | int]]:
    """Returns every row group of these Parquet files in order, as file and row_group."""
    return [
        {"file": str(path), "row_group": number}
        for path in files
        for number in range(pq.read_metadata(path).num_row_groups)
    ]


def rows_per_commit(rows: int, image_size: int) -> int:
    """Returns a number so small that a kill costs little and progress shows, so large that files stay few.

    At least 16: Ray Data takes 0.15 s from the end of one task to the begin of the next. The pixels of one
    commit, image_size x image_size RGB, fit one block.
    """
    most = min(4096, BLOCK_BYTES // (3 * image_size**2))
    return max(1, min(most, max(16, rows // 32)))


def rows_per_block(rows: int, commit_rows: int, image_size: int) -> int:
    """Returns the rows of a few whole commits, one alone where a run has few.

    A block costs the driver of Ray Data 1.5 ms and 5 kB.
    """
    fit = BLOCK_BYTES // (3 * image_size**2 * commit_rows)
    return commit_rows * max(1, min(fit, rows // (commit_rows * FEW_BLOCKS)))
