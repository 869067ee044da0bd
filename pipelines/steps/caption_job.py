"""The captioning job: every image of a manifest, each exactly once.

    manifest -> pending rows -> decode (tasks) -> caption, commit (actors) -> audit, compact, report

A session works off what is pending and commits outcomes, a Parquet file each time. The finish step then
audits them against the manifest. Killed anywhere, the same command does only what is missing.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import ray.data
import ray.exceptions

from cluster.errors import EXIT_PROBLEM, RESUME, plain_errors
from cluster.session import cluster_resource, quiet_data_context, ray_session, refuse_relative_paths
from pipelines.steps.captioning import CaptionAndCommit
from pipelines.steps.decoding import Decode, read_row_group
from pipelines.steps.job import Plan, make_plan
from pipelines.steps.ledger import FIRST_JUDGEMENT, RemoteLedger
from pipelines.steps.pool import actor_pool
from pipelines.steps.progress import ProgressBar
from pipelines.steps.table import print_summary
from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.finish import commits, compact, roll_forward, summarise
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.report import write_report
from sharegpt4v.captions.resume import (
    ALL_REASONS,
    RunProgress,
    row_groups,
    rows_per_commit,
    survey,
    write_pending,
)
from sharegpt4v.captions.sessions import begin_session, end_session
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.images import ImageReader
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.manifest.locate import locate
from sharegpt4v.run.lock import RunLock
from sharegpt4v.run.settings import check_fingerprint, read_settings, write_settings

log = logging.getLogger(__name__)


def run_caption(config: CaptionConfig) -> int:
    """Does the whole job and returns the exit code: begin or resume, work off what is pending, finish."""
    model = None if config.model == "toy" else config.model
    refuse_relative_paths(images=config.images, root=config.root, out=config.out, model=model)
    plan = make_plan(config)
    run = CaptionRun.open(config.out)
    with RunLock(run.path):
        roll_forward(run)
        check_fingerprint(run, plan.fingerprint)
        manifest = _take_in(config, run)
        done, progress = survey(run, config.retry_rejects)
        _say_unknown_reason(config.retry_rejects, progress)
        if progress.done == progress.rows and run.success.exists():
            print(f"{run.path} is finished: nothing to do", file=sys.stderr)
            print_summary(run)
            print(f"report: {run.path / 'report.html'}")
            return 0
        run.success.unlink(missing_ok=True)
        facts = _facts(config, plan, manifest)
        write_settings(run, config.model_dump(mode="json"), plan.fingerprint, facts)
        per_commit = config.rows_per_commit or _rows_per_commit(config, plan, progress)
        files = write_pending(run, done, per_commit)
        if files:
            print(f"{progress.done:,} of {progress.rows:,} images are done", file=sys.stderr)
            stopped = _work(config, plan, run, files, per_commit, progress, manifest.root)
            if stopped:
                print(f"sharegpt4v caption: {_explain_stop(stopped)}", file=sys.stderr)
                return EXIT_PROBLEM
        return _finish(config, run, facts)


def _take_in(config: CaptionConfig, run: CaptionRun) -> Manifest:
    """The input as manifest shards, joined to what the run already holds; says what was passed over."""
    print(f"reading {config.images}", file=sys.stderr)
    if config.root is None and (run.path / "run.yaml").exists():
        before, now = read_settings(run.path)["root"], locate(config.images, None).root
        if before != now:
            raise UserError(
                f"this run's images were read below {before}, now it would be {now}: "
                f"give --root explicitly, or another --out"
            )
    manifest = normalise(
        config.images,
        config.root,
        run.manifest,
        limit=config.limit,
        sample=config.sample,
        source=config.source,
        dedupe_image=config.dedupe_image,
        progress=_say_read,
    )
    notes = {
        **{f"{suffix or 'unnamed'} files": count for suffix, count in manifest.ignored.items()},
        "records without an image": manifest.without_image,
        "repeated images": manifest.repeats,
    }
    passed_over = ", ".join(f"{count:,} {what}" for what, count in notes.items() if count)
    if passed_over:
        print(f"passed over: {passed_over}", file=sys.stderr)
    if manifest.same_image_ids:
        print(f"{manifest.same_image_ids:,} ids share an image with an earlier one", file=sys.stderr)
    return manifest


def _say_unknown_reason(reason: str | None, progress: RunProgress) -> None:
    """A mistyped reason would retry nothing without a word; one that is all repaired is no mistake."""
    if reason not in (None, ALL_REASONS, *progress.reasons):
        known = ", ".join(f"{name} ({count:,})" for name, count in progress.reasons.items())
        print(f"no reject has the reason {reason!r}; there are: {known or 'none'}", file=sys.stderr)


def _say_read(records: int) -> None:
    if records % 100_000 == 0:
        print(f"read {records:,} records", file=sys.stderr)


def _rows_per_commit(config: CaptionConfig, plan: Plan, progress: RunProgress) -> int:
    """A real captioner commits every few of its batches; the fake one is as fast as files are written."""
    by_size = rows_per_commit(progress.rows - progress.done, plan.image_size)
    return by_size if config.engine == "fake" else min(by_size, 2 * config.batch_size)


def _facts(config: CaptionConfig, plan: Plan, manifest: Manifest) -> dict[str, Any]:
    return {
        "root": manifest.root,
        "model": plan.spec.model,
        "engine": config.engine,
        "prompt_id": plan.rules.prompt.id,
        "prompt_text": plan.rules.prompt.text,
    }


def _work(
    config: CaptionConfig,
    plan: Plan,
    run: CaptionRun,
    files: list[Path],
    per_commit: int,
    progress: RunProgress,
    root: str,
) -> str | None:
    """One session over the pending files. Returns why the ledger stopped it, or None when all is written."""
    with ray_session(config.address):
        quiet_data_context(no_progress_seconds=max(1800.0, 3 * config.hang_seconds))
        ledger = RemoteLedger.start(config.max_reject_rate, progress.captions, progress.rejects)
        outcomes = begin_session(run)
        with ProgressBar("captioned", ledger.tally, progress.rows, progress.done):
            try:
                with plain_errors(RESUME):
                    dataset(config, plan, files, per_commit, root, ledger, outcomes).materialize()
            except RunFailed:
                stop = _stop_reason(ledger)
                if stop is None:
                    raise
                _note_engines(run, outcomes, ledger)
                return stop
        _note_engines(run, outcomes, ledger)
    return None


def _note_engines(run: CaptionRun, outcomes: Path, ledger: RemoteLedger) -> None:
    """Statistics only: that they are lost must not end a run."""
    try:
        end_session(run, outcomes, ledger.engines())
    except (ray.exceptions.RayError, OSError) as error:
        log.warning("the statistics of the engines are lost: %s", error)


def _stop_reason(ledger: RemoteLedger) -> str | None:
    try:
        return ledger.tally().stop
    except ray.exceptions.RayError:
        return None  # it went down with the cluster, which is the reason then


def dataset(
    config: CaptionConfig,
    plan: Plan,
    files: list[Path],
    per_commit: int,
    root: str,
    ledger: RemoteLedger,
    outcomes: Path,
) -> ray.data.Dataset:
    """The flow itself: a row group of the pending files is a block from reading to its commit, as a rule.

    Its own rows tell only how much was committed. The row groups are named here and read where they are
    decoded: ray.data.read_parquet would start several processes to list and inspect files that we have just
    written.
    """
    decode = Decode(ImageReader(root), plan.image_size, plan.protocol, config.fast_decode, ledger)
    groups = row_groups(files)
    return (
        ray.data.from_items(groups, override_num_blocks=len(groups))
        .map_batches(read_row_group, batch_size=1, batch_format="pyarrow")
        # A block at a time: with a batch size Ray would gather that many row groups into one task.
        .map_batches(decode.__call__, batch_size=None, batch_format="pyarrow")
        .map_batches(
            CaptionAndCommit,
            fn_constructor_args=(outcomes, plan.spec, plan.rules, ledger, config.hang_seconds),
            compute=actor_pool(config, cluster_resource("GPU"), cluster_resource("CPU")),
            batch_size=per_commit,
            batch_format="pyarrow",
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor or None,
        )
    )


def _explain_stop(stop: str) -> str:
    return (
        f"{stop}. Put --root (or the images) right and run again with --retry-rejects, "
        f"or raise --max-reject-rate"
    )


def _finish(config: CaptionConfig, run: CaptionRun, facts: dict[str, Any]) -> int:
    """Audit, compact, summary, report, and last of all _SUCCESS."""
    committed = commits(run)
    counts = compact(run)
    summary = summarise(run, counts, committed, facts)
    report = write_report(run.path, root=facts["root"])
    print_summary(run)
    if counts.rows >= FIRST_JUDGEMENT and summary["reject_rate"] > config.max_reject_rate:
        print(
            f"sharegpt4v caption: {summary['reject_rate']:.1%} of {counts.rows:,} images were rejected, "
            f"--max-reject-rate is {config.max_reject_rate:.1%}: no _SUCCESS is written; see {report}",
            file=sys.stderr,
        )
        return EXIT_PROBLEM
    write_atomic(run.success, "")
    print(f"report: {report}")
    return 0
