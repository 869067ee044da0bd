"""Training runs of tests: the real worker, in this process or in several that speak gloo, without Ray."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sharegpt4v.config.base import resolve
from sharegpt4v.config.train import CONFIGS, StageName
from sharegpt4v.train.backend import PlainBackend
from sharegpt4v.train.deepspeed_backend import DeepSpeedBackend
from sharegpt4v.train.job import TrainJob, check_config, make_job, take_in_data
from sharegpt4v.train.logs import read_metrics
from sharegpt4v.train.worker import train_worker
from tests.train.data import write_conversations

SMALL = {
    "batch_size": 6,
    "max_length": 400,
    "tokens_per_micro_step": 600,
    "max_steps": 6,
    "save_steps": 2,
    "warmup_ratio": 0.2,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "decode_threads": 1,
    "hang_seconds": 60.0,
}
"""Several micro-steps a step, and a checkpoint every other step."""


def prepare_job(folder: Path, stage: StageName = "sft", run: str = "run", **given: Any) -> TrainJob:
    """Takes in the toy conversations below `folder` and returns the job, as the command does."""
    data = folder / "talk.json"
    if not data.exists():
        write_conversations(folder, 12, 3, rounds=3 if stage == "sft" else 1)
    values = {"data": [str(data)], "root": str(folder / "images"), "out": str(folder / run), "init": "toy"}
    config = resolve(CONFIGS[stage], CONFIGS[stage].presets["toy"].values, SMALL | values | given)
    out = folder / run
    out.mkdir(exist_ok=True)
    card = check_config(config)
    sets, intake = take_in_data(config, out)
    return make_job(config, out, card, sets, intake, {})


def train_here(job: TrainJob) -> list[float]:
    """Trains in this process; returns the losses of all steps so far."""
    torch.set_num_threads(1)
    train_worker(job)
    return losses(job)


def train_in_processes(job: TrainJob, workers: int, spoil: dict[int, float] | None = None) -> list[float]:
    """Trains in processes of their own over gloo; returns the losses of all steps so far.

    spoil: see `spoilt_gradients`.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/meeting", workers, job, spoil or {})
        mp.start_processes(_worker, arguments, nprocs=workers, start_method="spawn")  # type: ignore
    return losses(job)


def losses(job: TrainJob) -> list[float]:
    return [line["loss"] for line in read_metrics(job.run)]


def stop_at(job: TrainJob, step: int) -> TrainJob:
    """Returns a job that ends early, under the same schedule."""
    return replace(job, loop=replace(job.loop, stop_at=step))


@contextmanager
def spoilt_gradients(
    backend: type[PlainBackend | DeepSpeedBackend], factors: dict[int, float]
) -> Iterator[None]:
    """Multiplies the gradients of these steps, from 1 on, in training that begins within.

    The loss that is reported stays as it is: an infinite gradient behind a finite loss.
    """
    own, step = backend.backward, 1

    def backward(self: Any, loss: torch.Tensor, *, last: bool) -> None:
        nonlocal step
        own(self, loss * factors.get(step, 1.0), last=last)
        step += last

    backend.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        backend.backward = own  # type: ignore[method-assign]


def _worker(rank: int, store: str, workers: int, job: TrainJob, spoil: dict[int, float]) -> None:
    sys.stdout = sys.stderr = open("/dev/null", "w")  # DeepSpeed prints what it has found on the machine
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    with spoilt_gradients(DeepSpeedBackend if job.zero else PlainBackend, spoil):
        train_worker(job)
    dist.destroy_process_group()
