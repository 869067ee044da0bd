"""The training job of every stage: data and model are checked, workers train, the command concludes.

    data -> records -> training workers (checkpoints, metrics) -> end product, summary, report

Killed anywhere, the same command goes on from the last checkpoint.
"""

import json
import os
import pickle
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.errors import EXIT_INTERRUPTED
from cluster.session import cluster_resource, connection_text, ray_session, refuse_relative_paths
from cluster.watchdog import prompt_interrupts
from pipelines.steps.clock import command_started
from pipelines.steps.phases import Phases
from pipelines.steps.train_worker import FAILURE, WorkerTask, read_failure, train_on_worker
from pipelines.steps.training_progress import TrainingProgress
from sharegpt4v.atomic import write_atomic
from sharegpt4v.config.train import LmmConfig, TrainConfig
from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.run.disk import full_disk_named
from sharegpt4v.run.folder import RunFolder
from sharegpt4v.run.lock import RunLock
from sharegpt4v.run.settings import check_fingerprint, read_settings, write_settings
from sharegpt4v.train.assemble import assemble, check_parts
from sharegpt4v.train.checkpoint import Checkpoints
from sharegpt4v.train.job import TrainJob, check_config, fingerprint, make_job, take_in_data
from sharegpt4v.train.logs import read_metrics
from sharegpt4v.train.report import write_report
from sharegpt4v.train.sets import TrainingSet

RESUME = "the last checkpoint is kept: run the same command again"


@dataclass(frozen=True, slots=True)
class TrainRun(RunFolder):
    """Paths of a training run beside those of every run."""

    @property
    def product(self) -> Path:
        """The trained model, a transformers folder."""
        return self.path / "model"


def run_train(config: TrainConfig) -> int:
    """Does the whole job under the lock of its run folder. Returns the exit code."""
    refuse_relative_paths(
        out=config.out, root=config.root, init=None if config.init == "toy" else config.init
    )
    for text in config.data + config.eval_data:
        refuse_relative_paths(data=TrainingSet.parse(text).path)
    parts = _parts(config)
    if parts is None:
        check_config(config)
    run = TrainRun.open(config.out)
    phases = Phases(command_started())
    with full_disk_named(run.path, RESUME), RunLock(run.path), phases, prompt_interrupts():
        try:
            return _begin_or_resume(config, run, phases)
        except KeyboardInterrupt:
            phases.end()
            print(f"\n{_interrupted(run, config.out)}", file=sys.stderr, flush=True)
    # The trainer's thread is still inside Ray's C++ code, which Python's own end would take down under it.
    os._exit(EXIT_INTERRUPTED)


def describe(config: TrainConfig) -> str:
    """Describes what would run, as far as it is known without reading the data."""
    parts = _parts(config)
    begins = f"{parts[0]} and {parts[1]}" if parts else check_config(config).id
    sets = [TrainingSet.parse(text) for text in config.data]
    steps = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epochs"
    lines = [
        f"stage: {config.stage.name}, trains {config.stage.trains}",
        f"begins from: {begins}, images by the {config.protocol} protocol",
        *(f"data: {each.path}, weight {each.weight:g}" for each in sets),
        f"schedule: {steps} of {config.batch_size} samples, rate {config.learning_rate:g}",
        f"workers: {config.workers}, ZeRO {config.zero}",
    ]
    return "\n".join(lines)


def _parts(config: TrainConfig) -> tuple[Path, Path, Path | None] | None:
    """Returns the parts to start from, None where `init` is used. Raises UserError for half of them."""
    if not isinstance(config, LmmConfig) or (config.language_model, config.vision_tower) == (None, None):
        return None
    if config.language_model is None or config.vision_tower is None:
        missing = "vision_tower" if config.language_model else "language_model"
        raise UserError("required with the other part of the model", field=missing)
    check_parts(config.language_model, config.vision_tower, config.projector)
    return config.language_model.absolute(), config.vision_tower.absolute(), config.projector


def _begin_or_resume(config: TrainConfig, run: TrainRun, phases: Phases) -> int:
    """Runs the steps in order: take in the data, train on workers, conclude."""
    if parts := _parts(config):
        phases.begin("joining language model and vision tower")
        assemble(*parts, run.path / "init")
        config = config.model_copy(update={"init": str(run.path / "init")})
    phases.begin("reading data")
    card = check_config(config)
    sets, intake = take_in_data(config, run.path)
    decides = fingerprint(config, card, intake.digest)
    check_fingerprint(run, decides)
    for reason, count in intake.dropped.items():
        phases.say(f"dropped {count:,} records: {reason}")
    write_settings(
        run, config.model_dump(mode="json"), decides, {"stage": config.stage.name, "model": card.id}
    )
    facts = {"git_revision": read_settings(run.path)["git_revision"]}
    job = make_job(config, run.path, card, sets, intake, facts)
    newest = Checkpoints(job.checkpoints, job.keep).newest()
    if run.success.exists() and run.product.exists():
        phases.end()
        print(f"{run.path} is finished: nothing to do", file=sys.stderr)
        return 0
    run.success.unlink(missing_ok=True)
    done = int(newest.name.removeprefix("step-")) if newest else 0
    phases.say(
        f"{sum(intake.counts):,} records, {job.loop.steps:,} steps of {config.batch_size}"
        + (f", going on from step {done:,}" if done else "")
    )
    with TrainingProgress(job, phases, done):
        _train(config, job, phases)
    return _conclude(config, job, run, phases)


def _train(config: TrainConfig, job: TrainJob, phases: Phases) -> None:
    """Trains on Ray's workers. Raises what ended them: UserError or RunFailed."""
    phases.begin(connection_text(config.address))
    with ray_session(config.address):
        workers = _workers(config)
        _probe(job.run)
        phases.begin(
            f"loading {job.card['began_from'].partition('@')[0]} on {workers} worker{'s' * (workers > 1)}"
        )
        (job.run / "work" / FAILURE).unlink(missing_ok=True)
        trainer = TorchTrainer(
            train_on_worker,
            # As bytes: to read it Ray's controller would import transformers, before any worker begins.
            train_loop_config={"task": pickle.dumps(WorkerTask(job, max(1, int(config.cpus_per_worker))))},
            torch_config=TorchConfig(
                backend="nccl" if config.gpus_per_worker else "gloo", timeout_s=int(config.hang_seconds) + 60
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker=_resources(config),
            ),
            # A folder of its own a call: the position is in our checkpoints, not in Ray's.
            run_config=RunConfig(
                name=f"train-{int(phases.started)}",
                storage_path=str(job.run / "work" / "ray"),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            _fit(trainer)
        except KeyboardInterrupt:
            raise
        except Exception as error:
            raise read_failure(job.run) or RunFailed(f"{_why(error)}; {RESUME}") from error
    if failure := read_failure(job.run):
        raise failure


def _fit(trainer: TorchTrainer) -> None:
    """Runs the trainer outside of the main thread, where it would put its handler of Ctrl-C over ours."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            trainer.fit()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    outcome.result()


def _resources(config: TrainConfig) -> dict[str, float]:
    gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    return {"CPU": config.cpus_per_worker} | gpus


def _workers(config: TrainConfig) -> int:
    """Returns the number of workers. Raises UserError where the cluster has no room for them."""
    gpus, cpus = cluster_resource("GPU"), cluster_resource("CPU")
    if config.workers == "auto":
        workers = max(1, int(gpus // config.gpus_per_worker)) if config.gpus_per_worker else 1
    else:
        workers = int(config.workers)
    for name, each, there in (("GPU", config.gpus_per_worker, gpus), ("CPU", config.cpus_per_worker, cpus)):
        if workers * each > there:
            raise UserError(
                f"{workers} workers need {workers * each:g} {name}s and the cluster has {there:g}: "
                "give fewer, or a larger cluster",
                field="workers",
            )
    if workers > config.batch_size:
        raise UserError(
            f"{config.batch_size} is refused: {workers} workers need a sample each", field="batch_size"
        )
    return workers


def _probe(run: Path) -> None:
    """Raises UserError when a node does not see the run folder: checkpoints of its workers would be lost."""
    probe = run / "work" / "probe"
    write_atomic(probe, "seen")
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) < 2:
        return
    look = ray.remote(num_cpus=0)(_sees)
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    seen = ray.get(
        [look.options(scheduling_strategy=strategy(n["NodeID"], False)).remote(probe) for n in nodes]
    )
    blind = [node["NodeManagerAddress"] for node, sees in zip(nodes, seen, strict=True) if not sees]
    if blind:
        raise UserError(
            f"{run} is not there on node {blind[0]}: give a folder on storage that every node sees",
            field="out",
        )


def _sees(path: Path) -> bool:
    return path.exists()


def _why(error: BaseException) -> str:
    """Describes in one line what ended the workers: the first of their own errors where Ray names one."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    for rank, cause in sorted(failures.items()):
        lines = [line for line in str(cause).strip().splitlines() if line.strip()]
        return f"worker {rank} ended: {' '.join((lines or [type(cause).__name__])[-1].split())[:200]}"
    return f"training ended: {' '.join(str(error).split())[:200]}"


def _conclude(config: TrainConfig, job: TrainJob, run: TrainRun, phases: Phases) -> int:
    """Writes the summary and, where the schedule is at its end, `_SUCCESS`."""
    lines = read_metrics(run.path)
    summary = _summary(job, lines)
    write_atomic(run.summary, json.dumps(summary, indent=1))
    write_report([run.path], run.report)
    phases.end()
    finished = summary["step"] == job.loop.steps
    print(
        f"{summary['step']:,} of {job.loop.steps:,} steps, loss {summary['loss']:.4f}, "
        f"{summary['samples']:,} samples at {summary['samples_per_second']:,.1f} samples/s and "
        f"{summary['tokens_per_second']:,.0f} tokens/s"
    )
    if summary["rejects"]:
        print(f"{summary['rejects']:,} samples were replaced: {run.path / 'rejects'} names them")
    if not finished:
        print(f"stopped as asked: {RESUME}, without `stop_after`".replace("`stop_after`", "--stop-after"))
        return 0
    print(f"model: {run.product}\nreport: {run.report}")
    run.success.touch()
    return 0


def _summary(job: TrainJob, lines: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(line["seconds"] for line in lines) or 1.0
    tail = [line["loss"] for line in lines[-20:] if line["loss"] is not None]
    return {
        "stage": job.stage.name,
        "step": lines[-1]["step"] if lines else 0,
        "steps": job.loop.steps,
        "loss": sum(tail) / max(1, len(tail)),
        "seconds": seconds,
        **{key: sum(line[key] for line in lines) for key in ("samples", "tokens", "rejects", "cut")},
        "skipped": sum(line["skipped"] for line in lines),
        "samples_per_second": sum(line["samples"] for line in lines) / seconds,
        "tokens_per_second": sum(line["tokens"] for line in lines) / seconds,
    }


def _interrupted(run: TrainRun, out: Path) -> str:
    newest = Checkpoints(run.work / "checkpoints", 1).newest()
    if newest is None:
        return f"interrupted before the first checkpoint: the same command begins {out} anew"
    step = int(newest.name.removeprefix("step-"))
    return f"interrupted: step {step:,} is saved in {out}; the same command goes on from there"
