"""Caption every image of a manifest, each exactly once: `python -m pipelines.caption --images DIR --out RUN`.

    manifest -> pending rows -> decode (tasks) -> caption (actors) -> outcomes -> audit, compact, report

A session works off what is pending and writes outcomes, one Parquet file a commit. The finish step then
audits them against the manifest. Killed anywhere, the same command does only what is missing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.data
import ray.exceptions

from pipelines.failure import RESUME, plain_errors
from pipelines.ledger import FIRST_JUDGEMENT, RemoteLedger
from pipelines.progress import ProgressBar
from pipelines.session import (
    cluster_resource,
    inside_job,
    quiet_data_context,
    ray_session,
    refuse_relative_paths,
)
from pipelines.steps import Caption, CaptionRules, Decode, read_row_group
from pipelines.table import print_summary
from sharegpt4v.config import CAPTION_PRESETS, CaptionConfig
from sharegpt4v.engine.base import SamplingParams
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.flags import EXIT_PROBLEM, run_command
from sharegpt4v.gate import GateRules
from sharegpt4v.images import ImageReader
from sharegpt4v.images import Protocol as ImageProtocol
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.manifest.locate import locate
from sharegpt4v.prompts import UNIFIED_CAPTION, Prompt
from sharegpt4v.run.finish import commits, compact, roll_forward, summarise
from sharegpt4v.run.folder import (
    RunFolder,
    begin_session,
    check_fingerprint,
    open_run,
    read_settings,
    write_settings,
)
from sharegpt4v.run.lease import Lease
from sharegpt4v.run.pending import ALL_REASONS, Progress, row_groups, rows_per_commit, survey, write_pending
from sharegpt4v.run.report import write_report
from sharegpt4v.weights import read_card

CALLS_PER_ACTOR = 4
"""Batches an actor holds at once: while one waits for its last captions the others fill the engine."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the configuration comes to: which engine, asked how, over images of which shape."""

    spec: EngineSpec
    rules: CaptionRules
    image_size: int
    protocol: ImageProtocol
    fingerprint: dict[str, Any]


def main(argv: Sequence[str] | None = None, runtime_env: dict[str, Any] | None = None) -> int:
    """Returns the exit code: 0 done, 1 stopped, 2 wrong request, 130 interrupted."""
    return run_command(
        "caption",
        CaptionConfig,
        partial(run_caption, runtime_env=runtime_env),
        sys.argv[1:] if argv is None else argv,
        presets=CAPTION_PRESETS,
        bare={"retry_rejects": "all"},
        plan=describe_plan,
    )


def run_caption(config: CaptionConfig, runtime_env: dict[str, Any] | None = None) -> int:
    """The whole job: begin or resume, work off what is pending, finish."""
    model = None if config.model == "toy" else config.model
    refuse_relative_paths(images=config.images, root=config.root, out=config.out, model=model)
    plan = make_plan(config)
    run = open_run(config.out)
    with Lease(run.path):
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
            stopped = _work(config, plan, run, files, per_commit, progress, manifest.root, runtime_env)
            if stopped:
                print(f"sharegpt4v caption: {_explain_stop(stopped)}", file=sys.stderr)
                return EXIT_PROBLEM
        return _finish(config, run, facts)


def make_plan(config: CaptionConfig) -> Plan:
    """Resolves model, prompt and rules without loading a weight. Raises UserError for what does not exist."""
    if config.engine == "fake":
        model, weights, size, protocol = "fake@0", None, config.fake.image_size, config.protocol or "squash"
    else:
        card = read_card(config.model)
        # A URI goes to the actors as it is: each node fetches it once into its own cache.
        weights = config.model if "://" in config.model else str(card.folder.absolute())
        model, size, protocol = card.id, card.image_size, config.protocol or card.protocol
    decoding = config.decoding
    sampling = SamplingParams(
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        repetition_penalty=decoding.repetition_penalty,
    )
    retry = replace(sampling, temperature=decoding.retry_temperature, top_p=decoding.retry_top_p)
    prompt = UNIFIED_CAPTION if config.prompt is None else Prompt.of_user(config.prompt)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if config.gpus_per_actor else "float32"
    spec = EngineSpec(
        kind=config.engine,
        model=model,
        weights=weights,
        capacity=config.batch_size,
        room_for=(prompt.text, decoding.max_new_tokens),
        dtype=dtype,
        threads=config.threads_per_actor,
        use_gpu=config.gpus_per_actor > 0,
        fake=FakeOptions(**config.fake.model_dump()),
    )
    fingerprint = {
        "model": model,
        "prompt": f"{prompt.id}: {prompt.text}",
        "protocol": protocol,
        "image_size": size,
        "fast_decode": config.fast_decode,
        "dtype": dtype,
        **{f"decoding.{key}": value for key, value in decoding.model_dump().items()},
        **{f"gate.{key}": value for key, value in config.gate.model_dump().items()},
    }
    rules = CaptionRules(prompt, sampling, retry, GateRules(**config.gate.model_dump()))
    return Plan(spec, rules, size, protocol, fingerprint)


def describe_plan(config: CaptionConfig) -> str:
    """What `--dry-run` adds: the model that would run, and what a resume would find. Nothing is written."""
    plan = make_plan(config)
    lines = [f"# model {plan.spec.model}, images {plan.image_size} px by protocol {plan.protocol}"]
    if (config.out / "run.yaml").exists():
        run = RunFolder(config.out.absolute())
        check_fingerprint(run, plan.fingerprint)
        _, progress = survey(run, config.retry_rejects)
        lines.append(f"# resumes {run.path}: {progress.done:,} of {progress.rows:,} images are done")
    else:
        lines.append(f"# begins a new run in {config.out.absolute()}")
    return "\n".join(lines)


def _take_in(config: CaptionConfig, run: RunFolder) -> Manifest:
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


def _say_unknown_reason(reason: str | None, progress: Progress) -> None:
    """A mistyped reason would retry nothing without a word; one that is all repaired is no mistake."""
    if reason not in (None, ALL_REASONS, *progress.reasons):
        known = ", ".join(f"{name} ({count:,})" for name, count in progress.reasons.items())
        print(f"no reject has the reason {reason!r}; there are: {known or 'none'}", file=sys.stderr)


def _say_read(records: int) -> None:
    if records % 100_000 == 0:
        print(f"read {records:,} records", file=sys.stderr)


def _rows_per_commit(config: CaptionConfig, plan: Plan, progress: Progress) -> int:
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
    run: RunFolder,
    files: list[Path],
    per_commit: int,
    progress: Progress,
    root: str,
    runtime_env: dict[str, Any] | None,
) -> str | None:
    """One session over the pending files. Returns why the ledger stopped it, or None when all is written."""
    with ray_session(config.address, runtime_env):
        quiet_data_context(no_progress_seconds=max(1800.0, 3 * config.hang_seconds))
        ledger = RemoteLedger.start(config.max_reject_rate, progress.captions, progress.rejects)
        outcomes = begin_session(run)
        with ProgressBar("captioned", ledger.tally, progress.rows, progress.done):
            try:
                with plain_errors(RESUME):
                    dataset(config, plan, files, per_commit, root, ledger).write_parquet(str(outcomes))
            except RunFailed:
                stop = _stop_reason(ledger)
                if stop is None:
                    raise
                return stop
    return None


def _stop_reason(ledger: RemoteLedger) -> str | None:
    try:
        return ledger.tally().stop
    except ray.exceptions.RayError:
        return None  # it went down with the cluster, which is the reason then


def dataset(
    config: CaptionConfig, plan: Plan, files: list[Path], per_commit: int, root: str, ledger: RemoteLedger
) -> ray.data.Dataset:
    """The flow itself: a row group of the pending files stays one block from reading to its one outcome file.

    The row groups are named here and read where they are decoded. ray.data.read_parquet would start several
    processes to list and inspect files that we have just written.
    """
    decode = Decode(ImageReader(root), plan.image_size, plan.protocol, config.fast_decode, ledger)
    groups = row_groups(files)
    return (
        ray.data.from_items(groups, override_num_blocks=len(groups))
        .map_batches(read_row_group, batch_size=1, batch_format="pyarrow")
        # A block at a time: with a batch size Ray would gather that many row groups into one task.
        .map_batches(decode.__call__, batch_size=None, batch_format="pyarrow")
        .map_batches(
            Caption,
            fn_constructor_args=(plan.spec, plan.rules, ledger, config.hang_seconds),
            compute=_pool(config),
            batch_size=per_commit,
            batch_format="pyarrow",
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor or None,
        )
    )


def _pool(config: CaptionConfig) -> ray.data.ActorPoolStrategy:
    shape: dict[str, int]
    if config.actors == "auto":
        gpus = cluster_resource("GPU")
        shape = {"size": max(1, int(gpus / config.gpus_per_actor)) if config.gpus_per_actor else 2}
    elif ":" in config.actors:
        smallest, largest = map(int, config.actors.split(":"))
        shape = {"min_size": smallest, "max_size": largest}
    else:
        shape = {"size": int(config.actors)}
    _refuse_impossible(config, shape.get("size") or shape["min_size"])
    return ray.data.ActorPoolStrategy(
        **shape, max_concurrent_calls_per_actor=CALLS_PER_ACTOR, enable_true_multi_threading=True
    )


def _refuse_impossible(config: CaptionConfig, actors: int) -> None:
    """Actors that no node can hold would be waited for in silence. Only a cluster may still grow."""
    if config.address is not None or inside_job():
        return
    gpus, cpus = actors * config.gpus_per_actor, actors * config.cpus_per_actor
    if gpus > cluster_resource("GPU"):
        raise UserError(
            f"{actors} actors of {config.gpus_per_actor:g} GPUs need {gpus:g}, this machine has "
            f"{cluster_resource('GPU'):g}: set --gpus-per-actor 0, or run on a cluster with --address"
        )
    if cpus > cluster_resource("CPU") - 1:
        raise UserError(
            f"{actors} actors of {config.cpus_per_actor:g} CPUs leave none of {cluster_resource('CPU'):g} to "
            f"decode with: lower --actors or --cpus-per-actor"
        )


def _explain_stop(stop: str) -> str:
    return (
        f"{stop}. Put --root (or the images) right and run again with --retry-rejects, "
        f"or raise --max-reject-rate"
    )


def _finish(config: CaptionConfig, run: RunFolder, facts: dict[str, Any]) -> int:
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
    run.success.touch()
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
