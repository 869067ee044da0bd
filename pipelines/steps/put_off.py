"""The rows that a session has put off: tried again at its end, and listed when their storage still fails."""

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.steps.intake import Pending, write_down_pending
from pipelines.steps.job import CaptionJob
from sharegpt4v.atomic import atomic_path
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import Done, survey
from sharegpt4v.credentials import without_credentials
from sharegpt4v.manifest import Manifest


def pending_again(job: CaptionJob, run: CaptionRun, manifest: Manifest, since: int | None) -> Pending:
    """Writes down what has no outcome after a first pass. since: the first session of a retry of rejects."""
    return write_down_pending(job, run, manifest, *survey(run, job.config.retry_rejects, since))


def list_put_off(
    run: CaptionRun, messages: Mapping[str, str], retry_rejects: str | None = None, since: int | None = None
) -> str | None:
    """Writes put_off.jsonl and returns a line about it; None where every image has its outcome after all.

    messages: what the storage answered, by id, of some of the images. retry_rejects, since: as survey() takes
    them.
    """
    done, progress = survey(run, retry_rejects, since)
    count, example = 0, ""
    if progress.done == progress.rows:
        return None
    with atomic_path(run.put_off) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in _without_outcome(run, done):
            row["message"] = without_credentials(messages.get(row["id"], ""))
            example = example or row["message"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    images = f"{count:,} images could not be read" if count > 1 else "1 image could not be read"
    return (
        f"{images}, since the storage failed{f' ({example})' if example else ''}: see {run.put_off}; all "
        "others are done: run the same command again once it answers"
    )


def _without_outcome(run: CaptionRun, done: Done) -> Iterator[dict[str, str]]:
    for path, flags in zip(run.shards(), done, strict=True):
        rows = np.flatnonzero(~flags)
        if len(rows):
            table = pq.read_table(path, columns=["id", "image", "container", "source"])
            yield from table.take(pa.array(rows)).to_pylist()
