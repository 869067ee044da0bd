"""Parquet shards that appear complete or not at all."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from sharegpt4v.atomic import make_folder, publish
from sharegpt4v.errors import UserError
from sharegpt4v.records import MANIFEST


def shards(folder: Path) -> list[Path]:
    """Returns the manifest shards of a folder, in order; none if it does not exist.

    Raises UserError where one is missing between others: outcomes name their rows by the shard's position.
    """
    found = sorted(folder.glob("part-*.parquet"))
    for number, path in enumerate(found):
        if path.name != f"part-{number:05}.parquet":
            raise UserError(
                f"{folder} has no part-{number:05}.parquet before its {path.name}: restore it, then give the "
                f"run's command again"
            )
    return found


class ShardWriter:
    """Writes rows into a hidden folder beside the manifest; publish() moves whole shards under their names.

    Killed before publish, nothing is visible. Killed inside it, the first shards are: each is whole, and the
    next run finds their ids known and appends the rest.
    """

    def __init__(self, folder: Path, shard_rows: int) -> None:
        self.rows = 0
        self._folder = folder
        self._shard_rows = shard_rows
        self._next = len(shards(folder))
        self._temporary = folder.parent / f".{folder.name}.new"
        self._writer: pq.ParquetWriter | None = None
        self._room = 0

    def __enter__(self) -> Self:
        shutil.rmtree(self._temporary, ignore_errors=True)  # what a killed run left
        self._temporary.mkdir(parents=True)
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends rows of records.MANIFEST and opens a new shard when one is full."""
        while batch.num_rows:
            if not self._room:
                self._close()
                self._writer = pq.ParquetWriter(
                    self._temporary / f"part-{self._next:05d}.parquet", MANIFEST, compression="zstd"
                )
                self._next, self._room = self._next + 1, self._shard_rows
            assert self._writer is not None
            part, batch = batch.slice(0, self._room), batch.slice(self._room)
            self._writer.write_batch(part)
            self.rows += part.num_rows
            self._room -= part.num_rows

    def publish(self) -> None:
        """Moves the finished shards to the manifest's folder, in order."""
        self._close()
        make_folder(self._folder)
        for shard in sorted(self._temporary.glob("part-*.parquet")):
            publish(shard, self._folder / shard.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close()
        finally:  # the disk may be too full for the end of the file
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
