"""What runs in each of Ray Train's workers, and how an error of one becomes the command's."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.util.metrics import Gauge

from sharegpt4v.atomic import write_atomic
from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.images import StorageError
from sharegpt4v.train.job import TrainJob
from sharegpt4v.train.logs import Figures
from sharegpt4v.train.loop import StepLine
from sharegpt4v.train.worker import train_worker

FAILURE = "failure.json"
"""In the run's work folder: an error that another try would meet again."""


@dataclass(frozen=True)
class WorkerTask:
    """threads: CPU threads that torch uses in a worker."""

    job: TrainJob
    threads: int


def train_on_worker(config: dict[str, Any]) -> None:
    """Trains in one worker of the group that Ray has made. config: `task`, a pickled WorkerTask.

    Ray starts all workers again after any error. One that would come again is written down; the workers of
    the next start find it and end at once.
    """
    task: WorkerTask = pickle.loads(config["task"])
    torch.set_num_threads(task.threads)
    if (task.job.run / "work" / FAILURE).exists():
        return
    gauges = _gauges()

    def report(line: StepLine, figures: Figures) -> None:
        shown = {"loss": line.loss, "gradient_norm": line.gradient_norm, "balance": line.balance}
        shown |= {"tokens_per_second": figures.tokens_per_second, "step": line.step}
        for name, value in shown.items():
            gauges[name].set(value)

    try:
        train_worker(task.job, report)
    except (UserError, RunFailed, StorageError) as error:
        _write_down(task.job.run, error)
        raise
    except RuntimeError as error:  # a worker that died is seen by the others as one
        if isinstance(error, torch.OutOfMemoryError):
            advice = "lower `tokens_per_micro_step`, or set `zero` or `gradient_checkpointing`"
            _write_down(task.job.run, RunFailed(f"the device's memory is full: {advice}"))
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _write_down(task.job.run, RunFailed(cause))
        raise


def read_failure(run: Path) -> UserError | RunFailed | None:
    """Returns the error that a worker wrote down."""
    try:
        failure = json.loads((run / "work" / FAILURE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if failure["kind"] == "UserError":
        return UserError(failure["text"], field=failure["field"])
    return RunFailed(failure["text"])


def _write_down(run: Path, error: Exception) -> None:
    text = error.text if isinstance(error, UserError) else str(error)
    field = getattr(error, "field", None)
    kind = "UserError" if isinstance(error, UserError) else "RunFailed"
    write_atomic(run / "work" / FAILURE, json.dumps({"kind": kind, "text": text, "field": field}))


def _gauges() -> dict[str, Gauge]:
    names = ("loss", "gradient_norm", "balance", "tokens_per_second", "step")
    return {name: Gauge(f"sharegpt4v_train_{name}", description=f"{name} of the last step") for name in names}
