"""What a session of captioning begins with: its manifest, and the part of it that is still to do."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.steps.job import CaptionJob
from pipelines.steps.phases import Phases
from sharegpt4v.captions.finish import roll_forward
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import (
    ALL_REASONS,
    Done,
    RunProgress,
    begin_anew,
    has_outcomes,
    row_groups,
    rows_per_commit,
    write_pending,
)
from sharegpt4v.errors import UserError
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.manifest.locate import locate
from sharegpt4v.run.settings import check_fingerprint, check_version, read_settings


@dataclass(frozen=True, slots=True)
class Pending:
    """What a session has to do.

    groups: row groups of the files of work/pending, one for each commit of at most rows_per_commit images.
    root: where their paths begin. remote: whether some of the first images are URIs. progress: what the run
    had done before.
    """

    groups: list[dict[str, str | int]]
    rows_per_commit: int
    root: str
    remote: bool
    progress: RunProgress

    @property
    def images(self) -> int:
        """How many are still to be captioned."""
        return self.progress.rows - self.progress.done


def take_in(job: CaptionJob, run: CaptionRun, phases: Phases) -> Manifest:
    """Begins the run's manifest, or joins the input to what it holds, and says what was passed over.

    Raises UserError for a job that does not go with the outcomes that the run has.
    """
    check_version(run)
    roll_forward(run)
    if has_outcomes(run):
        refuse_changes(job, run)
    else:
        begin_anew(run)
    manifest = read_manifest(job, run.manifest, phases)
    if passed_over := describe_passed_over(manifest):
        phases.say(f"passed over: {passed_over}")
    if manifest.same_image_ids:
        phases.say(f"{manifest.same_image_ids:,} ids share an image with an earlier one")
    if warning := job.toy_warning(manifest.root):
        phases.say(warning)
    return manifest


def read_manifest(job: CaptionJob, folder: Path, phases: Phases) -> Manifest:
    """Writes the input to `folder`, joined to the shards that are there already."""

    def say_read(records: int) -> None:
        if records % 100_000 == 0:
            phases.say(f"{records:,} records")

    config = job.config
    phases.begin(f"reading {config.images}")
    return normalise(
        config.images,
        config.root,
        folder,
        limit=config.limit,
        sample=config.sample,
        source=config.source,
        dedupe_image=config.dedupe_image,
        progress=say_read,
    )


def refuse_changes(job: CaptionJob, run: CaptionRun) -> None:
    """Raises UserError for a job that does not go with the outcomes that the run has."""
    check_fingerprint(run, job.fingerprint)
    if job.config.root is None and run.settings.exists():
        before, now = read_settings(run.path)["root"], locate(job.config.images, None).root
        if before != now:
            raise UserError(
                f"this run's images were read below {before}, now it would be {now}: "
                f"give --root explicitly, or another --out"
            )


def describe_passed_over(manifest: Manifest) -> str:
    """Counts what the input held beside images; empty when there was nothing else."""
    notes = {
        **{f"{suffix or 'unnamed'} files": count for suffix, count in manifest.ignored.items()},
        "records without an image": manifest.without_image,
        "repeated images": manifest.repeats,
    }
    return ", ".join(f"{count:,} {what}" for what, count in notes.items() if count)


def say_progress(reason: str | None, progress: RunProgress, phases: Phases) -> None:
    """Says how much is done, and of a --retry-rejects `reason` that no reject has those there are.

    A mistyped reason would retry nothing without a word; one that is all repaired is no mistake.
    """
    done = f"{progress.done:,} of {progress.rows:,} images are done"
    phases.say(done if progress.done else f"{progress.rows:,} images")
    if reason not in (None, ALL_REASONS, *progress.reasons):
        known = ", ".join(f"{name} ({count:,})" for name, count in progress.reasons.items())
        phases.say(f"no reject has the reason {reason!r}; there are: {known or 'none'}")


def write_down_pending(
    job: CaptionJob, run: CaptionRun, manifest: Manifest, done: Done, progress: RunProgress
) -> Pending:
    """Writes work/pending from what survey() found to be done."""
    most = job.config.rows_per_commit or _rows_per_commit(job, progress)
    files = write_pending(run, done, most)
    return Pending(row_groups(files), most, manifest.root, is_remote(manifest.root, files), progress)


def is_remote(root: str, files: list[Path]) -> bool:
    """Returns whether the root, or an image or archive of the first commit in work/pending, is a URI."""
    if "://" in root or not files:
        return "://" in root
    first = pq.ParquetFile(files[0]).read_row_group(0, ["image", "container"])
    return any("://" in place for column in first.columns for place in column.to_pylist())


def _rows_per_commit(job: CaptionJob, progress: RunProgress) -> int:
    """Returns the size of a commit: every few batches of a real captioner, by size alone for the fake one."""
    by_size = rows_per_commit(progress.rows - progress.done, job.images.side)
    return by_size if job.config.engine == "fake" else min(by_size, 2 * job.config.batch_size)
