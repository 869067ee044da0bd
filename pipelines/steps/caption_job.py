"""The captioning job: every image of a manifest, each exactly once.

    manifest -> pending rows -> decode (tasks) -> caption, commit (actors) -> audit, compact, report

A session works off what is pending and commits outcomes, a Parquet file each time. The finish step then
audits them against the manifest. Killed anywhere, the same command does only what is missing.
"""

import logging
import sys
from pathlib import Path

import ray.data
import ray.exceptions

from cluster.errors import EXIT_INTERRUPTED, EXIT_PROBLEM, RESUME, plain_errors
from cluster.session import cluster_resource, connection_text, quiet_data_context, ray_session
from cluster.watchdog import prompt_interrupts
from pipelines.steps.captioning import CaptionAndCommit
from pipelines.steps.clock import command_started
from pipelines.steps.decoding import Decode, read_row_group
from pipelines.steps.finishing import conclude, finish
from pipelines.steps.intake import Pending, drop_unreadable, say_progress, take_in, write_down_pending
from pipelines.steps.interruption import describe_interruption
from pipelines.steps.job import CaptionJob, make_job
from pipelines.steps.ledger import RemoteLedger
from pipelines.steps.phases import Phases
from pipelines.steps.pool import actor_pool, decode_tasks, describe_size, pool_size
from pipelines.steps.progress import ProgressBar
from pipelines.steps.put_off import list_put_off, pending_again
from pipelines.steps.reject_limit import REMEDY
from pipelines.steps.storage_faults import Place, sample_places
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.notes import read_note
from sharegpt4v.captions.resume import survey
from sharegpt4v.captions.retry import end_retry, note_retry, retry_since
from sharegpt4v.captions.sessions import note_engines, session
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.credentials import without_credentials
from sharegpt4v.errors import RunFailed
from sharegpt4v.images import ImageReader
from sharegpt4v.manifest import Manifest
from sharegpt4v.run.disk import full_disk_named
from sharegpt4v.run.lock import RunLock
from sharegpt4v.run.settings import write_settings

log = logging.getLogger(__name__)


def run_caption(config: CaptionConfig) -> int:
    """Does the whole job under the lock of its run folder. Returns the exit code."""
    job = make_job(config)
    run = CaptionRun.open(config.out)
    phases = Phases(command_started())
    with full_disk_named(run.path, RESUME), RunLock(run.path), phases, prompt_interrupts():
        try:
            return _begin_or_resume(job, run, phases)
        except KeyboardInterrupt:
            phases.end()
            print(f"\n{describe_interruption(run, config.out)}", file=sys.stderr)
            return EXIT_INTERRUPTED


def _begin_or_resume(job: CaptionJob, run: CaptionRun, phases: Phases) -> int:
    """Runs the steps in order: take in the manifest, work off what is pending of it, finish."""
    config = job.config
    manifest = take_in(job, run, phases)
    reason = config.retry_rejects
    since = retry_since(run, reason, manifest.root) if reason else None
    done, progress = survey(run, reason, since)
    drop_unreadable(run, progress, phases)
    say_progress(reason, progress, phases)
    if progress.done == progress.rows and run.success.exists() and read_note(run.summary) is not None:
        phases.end()
        print(f"{run.path} is finished: nothing to do", file=sys.stderr)
        return conclude(job, run)
    for file in (run.success, run.put_off):
        file.unlink(missing_ok=True)
    write_settings(run, config.model_dump(mode="json"), job.fingerprint, job.facts(manifest.root))
    pending = write_down_pending(job, run, manifest, done, progress)
    if pending.groups:
        if reason and since is not None:
            note_retry(run, reason, manifest.root, since)
        stopped, put_off = _work_off(job, run, manifest, pending, since, phases)
        left = list_put_off(run, put_off, reason, since) if put_off and not stopped else None
        if stopped or left:
            print(f"sharegpt4v caption: {without_credentials(stopped or left or '')}", file=sys.stderr)
            return EXIT_PROBLEM
    return finish(job, run, manifest.root, phases)


def _work_off(
    job: CaptionJob,
    run: CaptionRun,
    manifest: Manifest,
    pending: Pending,
    since: int | None,
    phases: Phases,
) -> tuple[str | None, dict[str, str]]:
    """Runs one session over what is pending, and once more over what was put off.

    since: the first session of a retry of rejects. Returns why the ledger stopped it, None when it went
    through, and what the storage answered of images that are still put off, by id.
    """
    config, before = job.config, pending.progress
    phases.begin(connection_text(config.address))
    with ray_session(config.address), phases, session(run, phases.started) as outcomes:
        # Ray Data sees a block end, not the commits in it.
        patience = pending.commits_per_block * max(1800.0, 3 * config.hang_seconds)
        quiet_data_context(no_progress_seconds=patience)
        ledger = RemoteLedger.start(config.max_reject_rate, before.captions, before.rejects)
        workers = describe_size(pool_size(config, pending.images, cluster_resource("GPU")))
        phases.begin(f"loading {job.spec.model.partition('@')[0]} on {workers}")
        sample = sample_places(list(dict.fromkeys(Path(str(group["file"])) for group in pending.groups)))

        def bar() -> ProgressBar:
            return ProgressBar("captioned", ledger.tally, before.rows, before.done, phases, "first caption")

        stop = _flow(dataset(job, pending, ledger, outcomes, sample), bar(), ledger)
        if stop is None and (late := ledger.tally().put_off):
            phases.begin(f"trying {late:,} images again whose storage failed")
            ledger.begin_again()
            again = pending_again(job, run, manifest, since)
            if again.groups:
                # Without a sample: what is left may all lie on a host that is gone, and is listed then.
                stop = _flow(dataset(job, again, ledger, outcomes, []), bar(), ledger)
        if stop and ledger.tally().stop:
            end_retry(run)  # what was refused meanwhile is tried again once the cause is mended
        _note_engines(run, outcomes, ledger)
        return stop, ledger.faults() if stop is None else {}


def _flow(images: ray.data.Dataset, bar: ProgressBar, ledger: RemoteLedger) -> str | None:
    """Lets all images flow through. Returns why the ledger stopped them, None when they came through."""
    try:
        with bar, plain_errors(RESUME):
            images.materialize()
    except RunFailed:
        if stop := _stop_reason(ledger):
            return stop
        raise
    return None


def dataset(
    job: CaptionJob, pending: Pending, ledger: RemoteLedger, outcomes: Path, sample: list[Place]
) -> ray.data.Dataset:
    """Builds the flow: a row group of the pending files is one block from reading to its commit, as a rule.

    Its own rows only count what was committed. The row groups are named here and read where they are
    decoded: ray.data.read_parquet would start several processes to list and inspect files that we have just
    written. sample: places that show whether all of the storage is dead, or single images.
    """
    config, groups = job.config, pending.groups
    decode = Decode(ImageReader(pending.root), job.images, config.fast_decode, ledger, sample)
    tasks = decode_tasks(pending.images, pending.remote)
    return (
        ray.data.from_items(groups, override_num_blocks=len(groups))
        # Both with the same limit, or Ray would not make one task of them.
        .map_batches(read_row_group, batch_size=1, batch_format="pyarrow", compute=tasks)
        # A block at a time: with a batch size Ray would gather that many row groups into one task.
        .map_batches(decode.__call__, batch_size=None, batch_format="pyarrow", compute=tasks)
        .map_batches(
            CaptionAndCommit,
            fn_constructor_args=(outcomes, job.spec, job.rules, ledger, config.hang_seconds),
            compute=actor_pool(config, pending.images, cluster_resource("GPU"), cluster_resource("CPU")),
            batch_size=pending.rows_per_commit,
            batch_format="pyarrow",
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor or None,
        )
    )


def _note_engines(run: CaptionRun, outcomes: Path, ledger: RemoteLedger) -> None:
    """Statistics only: that they are lost must not end a run."""
    try:
        note_engines(run, int(outcomes.name), ledger.engines())
    except (ray.exceptions.RayError, OSError) as error:
        log.warning("the statistics of the engines are lost: %s", error)


def _stop_reason(ledger: RemoteLedger) -> str | None:
    """Returns in one line why the ledger ended the session, and what to do; None where it did not."""
    try:
        tally = ledger.tally()
    except ray.exceptions.RayError:
        return None  # it went down with the cluster, which is the reason then
    if tally.dead:
        return f"the storage fails, most images of a sample cannot be read: {tally.dead}; {RESUME}"
    return f"{tally.stop}; {REMEDY}" if tally.stop else None
