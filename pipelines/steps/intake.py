"""What a session of captioning begins with: its manifest, and the part of it that is still to do."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.steps.job import CaptionJob
from pipelines.steps.phases import Phases
from sharegpt4v.captions.blocks import row_groups, rows_per_block, rows_per_commit, write_pending
from sharegpt4v.captions.finish import roll_forward
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import set_aside
from sharegpt4v.captions.resume import ALL_REASONS, Done, RunProgress, begin_anew, has_outcomes, survey
from sharegpt4v.credentials import all_without_credentials
from sharegpt4v.errors import UserError
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.run.settings import check_fingerprint, check_version, read_settings


@dataclass(frozen=True, slots=True)
class Pending:
    """What a session has to do.

    groups: row groups of the files of work/pending, each at most commits_per_block commits of at most
    rows_per_commit images. root: where their paths begin. remote: whether some of the first images are URIs.
    progress: what the run had done before.
    """

    groups: list[dict[str, str | int]]
    rows_per_commit: int
    commits_per_block: int
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
    refuse_other_jobs(run)
    roll_forward(run)
    joins = None
    if has_outcomes(run):
        refuse_changes(job, run)
        joins = input_before(job, run)
    else:
        begin_anew(run)
    manifest = read_manifest(job, run.manifest, phases, joins, run.input)
    if passed_over := describe_passed_over(manifest):
        phases.say(f"passed over: {passed_over}")
    if manifest.same_image_ids:
        phases.say(f"{manifest.same_image_ids:,} ids share an image with an earlier one")
    if warning := job.toy_warning(manifest.root):
        phases.say(warning)
    return manifest


def read_manifest(
    job: CaptionJob, folder: Path, phases: Phases, joins: str | None, record: Path | None = None
) -> Manifest:
    """Writes the input to `folder`, joined to the shards that are there. joins, record: see normalise()."""

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
        joins=joins,
        record=record,
        progress=say_read,
    )


def refuse_other_jobs(run: CaptionRun) -> None:
    """Raises UserError for a folder that another version or another command began: it would be cleared."""
    check_version(run)
    if run.settings.exists() and "images" not in read_settings(run.path)["config"]:
        raise UserError(
            f"{run.path} holds a run of another command: give an empty or new folder", field="out"
        )


def refuse_changes(job: CaptionJob, run: CaptionRun) -> None:
    """Raises UserError for a job that does not go with the outcomes that the run has."""
    if not run.settings.exists():  # it precedes every outcome
        raise UserError(
            f"{run.path} has captions or rejects, but no run.yaml that says how they came about: restore "
            f"that file, or give another folder",
            field="out",
        )
    check_fingerprint(run, job.fingerprint)
    _refuse_less(job, run)
    before, now = read_settings(run.path)["config"].get("dedupe_image", False), job.config.dedupe_image
    if before != now:  # it decides the ids
        raise UserError(
            f"changed since this run began ({before} before, {now} now): restore it, or give another `out`",
            field="dedupe_image",
        )


def _refuse_less(job: CaptionJob, run: CaptionRun) -> None:
    """Raises UserError for a limit or a sample, new to the run, of fewer images than it holds.

    A run only grows: the rest would be captioned in spite of it. It does no harm where nothing is left to do.
    """
    before = read_settings(run.path)["config"]
    for field in ("limit", "sample"):
        most = getattr(job.config, field)
        if most is None or most == before.get(field):
            continue
        held = sum(pq.read_metadata(shard).num_rows for shard in run.shards())
        if most < held and (left := held - survey(run, job.config.retry_rejects)[1].done):
            raise UserError(
                f"{most:,} is less than the {held:,} images that this run holds, of which {left:,} are still "
                f"to do: leave `{field}` out, or give another `out`",
                field=field,
            )


def input_before(job: CaptionJob, run: CaptionRun) -> str | None:
    """Describes where the run's ids were read, None where the job's need not be among them.

    The first images of a manifest and a sample of it may have none in common.
    """
    settings = read_settings(run.path)
    before, config = settings["config"], job.config
    same = [before.get("images"), before.get("root")] == all_without_credentials([config.images, config.root])
    if same and (config.limit is not None or config.sample is not None):
        return None
    return f"{before.get('images')} below {settings['root']}"


def describe_passed_over(manifest: Manifest) -> str:
    """Counts what the input held beside images; empty when there was nothing else."""
    notes = {
        **{
            f"{what} files" if what.startswith(".") or what == "no suffix" else what: count
            for what, count in manifest.ignored.items()
        },
        "records without an image": manifest.without_image,
        "repeated images": manifest.repeats,
    }
    return ", ".join(f"{count:,} {what}" for what, count in notes.items() if count)


def drop_unreadable(run: CaptionRun, progress: RunProgress, phases: Phases) -> None:
    """Sets aside the files of outcomes that survey() found damaged, and says which."""
    if not progress.unreadable:
        return
    set_aside(progress.unreadable)
    names = ", ".join(str(path.relative_to(run.path)) for path in progress.unreadable[:3])
    count = len(progress.unreadable)
    more = f" and {count - 3:,} more" if count > 3 else ""
    phases.say(f"damaged and set aside, their images are done again: {names}{more}")


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
    block = rows_per_block(progress.rows - progress.done, most, job.images.side)
    files = write_pending(run, done, most, block)
    remote = is_remote(manifest.root, files)
    return Pending(row_groups(files), most, block // most, manifest.root, remote, progress)


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
