"""What a run leaves of its steps: metrics.jsonl, TensorBoard's events, and the samples that were replaced."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharegpt4v.atomic import write_atomic
from sharegpt4v.train.feed import Reject
from sharegpt4v.train.loop import StepLine

METRICS = "metrics.jsonl"
_TAIL = 8192
"""Bytes that hold a whole line: one has about 600."""

REJECTS = "rejects"
"""Folder of one file a worker."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A line of metrics.jsonl beside the loop's own. rates: by part. mfu: None where the peak is unknown.

    memory_gb: the most that the device, or the process on a CPU, has held. left: seconds to the end.
    """

    rates: dict[str, float]
    tokens_per_second: float
    samples_per_second: float
    mfu: float | None
    memory_gb: float
    left: float


_AT_CHECKPOINTS = ("evaluations.jsonl", "generations.jsonl")
"""Files of lines with a step that are written at checkpoints."""


class StepLog:
    """Appends steps; the first worker keeps the metrics, each its own rejects. first: the step begun from.

    What a killed run wrote beyond that step is taken away, so that each step has one line.
    """

    def __init__(self, run: Path, worker: int, first: int) -> None:
        self._worker = worker
        (run / REJECTS).mkdir(parents=True, exist_ok=True)
        self._rejects = run / REJECTS / f"worker-{worker:05}.jsonl"
        self._metrics = run / METRICS
        self._board: Any = None
        _cut_after(self._rejects, first)
        if worker:
            return
        for other in (run / REJECTS).glob("worker-*.jsonl"):  # of more workers than there are now
            _cut_after(other, first)
        for name in (METRICS, *_AT_CHECKPOINTS):
            _cut_after(run / name, first)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)

    def write(self, line: StepLine, figures: Figures, rejects: Sequence[Reject]) -> None:
        """Writes one step. On other workers than the first only their rejects."""
        if rejects:
            with open(self._rejects, "a", encoding="utf-8") as file:
                for reject in rejects:
                    record = {"step": line.step, **asdict(reject)}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self._worker:
            return
        record = asdict(line) | asdict(figures)
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
        for name in ("loss", "gradient_norm", "tokens_per_second", "samples_per_second", "balance", "mfu"):
            if record[name] is not None:
                self._board.add_scalar(f"train/{name}", record[name], line.step)
        for part, rate in figures.rates.items():
            self._board.add_scalar(f"learning_rate/{part}", rate, line.step)

    def close(self) -> None:
        """Writes out what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, one a step; a half-written last one is left out."""
    return list(_lines(run / METRICS))


def newest_metrics(run: Path) -> dict[str, Any] | None:
    """Returns the last whole line of metrics.jsonl without reading the others."""
    path = run / METRICS
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        texts = file.read().split(b"\n")
    whole = [text for text in texts[:-1] if text.startswith(b"{")]
    return json.loads(whole[-1]) if whole else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:  # the process was killed while it wrote
            return


def _cut_after(path: Path, step: int) -> None:
    """Removes the lines of later steps."""
    if path.exists():
        kept = [json.dumps(line, ensure_ascii=False) for line in _lines(path) if line["step"] <= step]
        write_atomic(path, "".join(f"{line}\n" for line in kept))


def _plain(value: Any) -> Any:
    """Returns a value that JSON knows: NaN becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
