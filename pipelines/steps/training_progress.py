"""The live line of a training run: one line a step, read from the run's metrics as workers write them."""

import threading
import time
from types import TracebackType
from typing import Any

from pipelines.steps.phases import Phases
from sharegpt4v.train.job import TrainJob
from sharegpt4v.train.logs import newest_metrics

_POLL_SECONDS = 1.0
_LINE_SECONDS = 5.0


class TrainingProgress:
    """Context manager that prints the newest step every few seconds, and the last one. done: steps before."""

    def __init__(self, job: TrainJob, phases: Phases, done: int) -> None:
        self._job, self._phases, self._seen = job, phases, done
        self._spoken = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="training-progress", daemon=True)

    def __enter__(self) -> "TrainingProgress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        size = -1
        while True:
            last = self._stop.wait(_POLL_SECONDS)
            path = self._job.run / "metrics.jsonl"
            grown = path.stat().st_size if path.exists() else 0
            if grown != size or last:
                size = grown
                line = newest_metrics(self._job.run)
                if line and line["step"] != self._seen:
                    self._show(line, last)
            if last:
                return

    def _show(self, line: dict[str, Any], last: bool) -> None:
        now = time.monotonic()
        if not last and now - self._spoken < _LINE_SECONDS:
            return
        self._spoken, self._seen = now, line["step"]
        self._phases.say(step_text(line, self._job.loop.stop_at))


def step_text(line: dict[str, Any], steps: int) -> str:
    """Returns a line of metrics.jsonl for people."""
    loss = "not a number" if line["loss"] is None else f"{line['loss']:.4f}"
    parts = [
        f"step {line['step']:,} of {steps:,}",
        f"loss {loss}",
        f"norm {line['gradient_norm']:.2f}" if line["gradient_norm"] is not None else "norm –",
        "rate " + "/".join(sorted({f"{rate:.2g}" for rate in line["rates"].values()})),
        f"{line['tokens_per_second']:,.0f} tokens/s",
        f"{line['samples_per_second']:,.1f} samples/s",
        *([f"MFU {line['mfu']:.0%}"] if line["mfu"] is not None else []),
        f"{line['memory_gb']:.1f} GB",
        f"balance {line['balance']:.2f}",
        f"about {line['left']:,.0f} s left",
    ]
    return ", ".join(parts) + (", skipped" if line["skipped"] else "")
