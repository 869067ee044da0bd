"""The captions of one run as the formats read them, whether the run is finished or not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.captions import parts
from sharegpt4v.captions.export.snapshot import take_snapshot
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.notes import read_summary
from sharegpt4v.errors import UserError
from sharegpt4v.run.settings import read_settings

Progress = Callable[[int, int], None]
"""Takes the rows written so far and the total."""


@dataclass
class CaptionSet:
    """What is exported, and how far the export is.

    folder: holds manifest/ and captions/: the run's own folder, or a snapshot of it. name: the run's.
    root: where image paths begin, a folder or URI. summary: the fields of summary.json. with_images: the
    format shall hold the images' bytes. partial: the run was not finished. left_out: ids of captions that the
    format cannot hold; the writer adds them.
    """

    folder: Path
    name: str
    root: str
    prompt: str
    summary: dict[str, Any]
    with_images: bool
    partial: bool
    progress: Progress
    left_out: list[str] = field(default_factory=list)
    done: int = 0

    @property
    def rows(self) -> int:
        """Captions there are."""
        return int(self.summary["captions"])

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yields the captions in order; memory stays flat.

        Raises UserError when there are more or fewer of them than the summary says.
        """
        seen = 0
        for batch in parts.batches(self.folder, "captions", columns):
            seen += len(batch)
            yield batch
        if seen != self.rows:
            raise UserError(
                f"{self.name} has {seen:,} captions and its summary.json says {self.rows:,}: another command "
                f"works on it, wait for that and export again"
            )

    def refuse_shards(self, target: str) -> None:
        """Raises UserError for images in tar shards, which have no path that `target` could name."""
        for batch in parts.batches(self.folder, "manifest", ["container"]):
            if pc.any(pc.not_equal(batch.column("container"), "")).as_py():
                raise UserError(
                    f"images of {self.name} lie in tar shards, and {target} can name files only: export as "
                    f"webdataset, or as hf with `with_images`"
                )

    def advance(self, rows: int) -> None:
        """Reports that so many more rows are written or left out."""
        self.done += rows
        self.progress(self.done, self.rows)


def open_captions(run: Path, scratch: Path, *, partial: bool, progress: Progress) -> CaptionSet:
    """Returns a finished run's captions where they are, an unfinished one's in a snapshot.

    scratch: an empty folder for the snapshot. partial: an unfinished run is wanted.
    Raises UserError for an unfinished run that is not, and for one without captions.
    """
    settings = read_settings(run)
    finished = (run / "_SUCCESS").exists()
    if finished:
        summary = read_summary(run)
    elif partial:
        facts = {key: settings[key] for key in ("root", "model", "engine", "prompt_id")}
        summary = take_snapshot(CaptionRun(run), scratch, facts)
    else:
        raise UserError(
            f"{run} is not finished (it has no _SUCCESS): run its `sharegpt4v caption` again, or take the "
            f"captions it has with `partial`"
        )
    if not summary["captions"]:
        why = "its report.html says why" if finished else "run its `sharegpt4v caption` again"
        raise UserError(f"{run} holds no captions, so there is nothing to export: {why}")
    return CaptionSet(
        folder=run if finished else scratch,
        name=run.resolve().name,
        root=settings["root"],
        prompt=settings["prompt_text"],
        summary=summary,
        with_images=False,
        partial=not finished,
        progress=progress,
    )
