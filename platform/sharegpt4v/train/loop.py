"""The training loop of all stages: flat, over a backend, with no knowledge of Ray, data or files of a run."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sharegpt4v.errors import RunFailed
from sharegpt4v.train.backend import Backend
from sharegpt4v.train.checkpoint import Checkpoints
from sharegpt4v.train.collate import PackedRow
from sharegpt4v.train.optimizer import rate_share

_RECENT = 50
"""Steps whose gradient norms say what is usual; a spike is named from the tenth on."""

JUDGED_SAMPLES = 50
"""Samples from which on the share of rejects is judged; in the last step it is with fewer."""


class Prepared(Protocol):
    """A worker's share of a step, as feed.PreparedStep."""

    step: int
    rows: list[PackedRow]
    ids: list[str]
    samples: int
    balance: float
    cut: int

    @property
    def rejects(self) -> Sequence[object]: ...


P = TypeVar("P", bound=Prepared)


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """steps: of the schedule. stop_at: the step to end before, at most `steps`. save_*: 0 for never."""

    steps: int
    stop_at: int
    warmup_ratio: float
    save_steps: int = 0
    save_minutes: float = 0.0
    skip_spikes: float = 0.0
    max_reject_rate: float = 1.0
    rejects_path: str = ""


@dataclass
class Totals:
    """What a run has done so far; kept in every checkpoint. norms: the newest gradient norms."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    rejects: int = 0
    cut: int = 0
    skipped: int = 0
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step's figures, over all workers. step: steps done. loss: mean cross entropy of a label token.

    rates: share of the peak learning rates. seconds: of the step, of which `waited` for data.
    skipped: the step changed nothing, as its loss or gradient was not usable.
    """

    step: int
    loss: float
    gradient_norm: float
    rate_share: float
    samples: int
    tokens: int
    label_tokens: int
    micro_steps: int
    balance: float
    seconds: float
    waited: float
    rejects: int
    cut: int
    skipped: bool


def train(
    backend: Backend,
    steps: Iterator[P],
    checkpoints: Checkpoints,
    settings: LoopSettings,
    totals: Totals,
    report: Callable[[StepLine, P], None],
    evaluate: Callable[[int], object] = lambda step: None,
) -> Totals:
    """Trains to `settings.stop_at` and leaves a checkpoint there. steps: from `totals.step` on.

    report is called after every step and evaluate at every checkpoint, on every worker.
    Raises RunFailed for a loss that is not a number,
    too many rejects, or a worker that hangs; then the last checkpoint is what a resume begins from.
    """
    saved_at, ended = time.monotonic(), time.monotonic()
    for prepared in steps:
        waited = time.monotonic() - ended
        backend.meet(f"step {prepared.step + 1}")
        by_time = settings.save_minutes and time.monotonic() - saved_at > 60 * settings.save_minutes
        counts = backend.total(
            [
                sum(row.label_tokens for row in prepared.rows),
                sum(row.tokens for row in prepared.rows),
                prepared.samples,
                len(prepared.rejects),
                prepared.cut,
                checkpoints.written,
                bool(by_time) and backend.worker == 0,  # one clock decides
            ]
        )
        labels, tokens, samples, rejects, cut = map(int, counts[:5])
        if checkpoints.pending and counts[5] == backend.workers:
            checkpoints.settle(backend)
        totals.rejects, totals.cut = totals.rejects + rejects, totals.cut + cut
        totals.samples += samples
        if totals.samples >= JUDGED_SAMPLES or totals.step + 1 == settings.steps:
            _check_rejects(totals, settings)

        share = rate_share(prepared.step, settings.steps, settings.warmup_ratio)
        losses = [_backward(backend, prepared.rows, n, labels) for n in range(len(prepared.rows))]
        loss = backend.total([float(torch.stack(losses).sum())])[0]
        norm = backend.gradient_norm()
        skip = _unusable(backend, prepared, settings, totals, loss, norm)
        if skip:
            backend.discard()
            totals.skipped += 1
        else:
            backend.update(share, norm)
            totals.norms = [*totals.norms, norm][-_RECENT:]
        totals.step = prepared.step + 1
        totals.tokens, totals.label_tokens = totals.tokens + tokens, totals.label_tokens + labels

        done, micro = time.monotonic(), len(prepared.rows)
        figures = (loss, norm, share, samples, tokens, labels, micro)
        line = StepLine(
            totals.step, *figures, prepared.balance, done - ended, waited, rejects, cut, skipped=skip
        )
        report(line, prepared)
        ended = done
        due = settings.save_steps and totals.step % settings.save_steps == 0
        if (due or counts[6]) and totals.step < settings.stop_at:
            checkpoints.settle(backend)
            checkpoints.begin(totals.step, backend, asdict(totals))
            evaluate(totals.step)
            saved_at = ended = time.monotonic()
    checkpoints.settle(backend)
    checkpoints.begin(totals.step, backend, asdict(totals))
    evaluate(totals.step)
    checkpoints.settle(backend)
    return totals


def _backward(backend: Backend, rows: Sequence[PackedRow], number: int, labels: int) -> Tensor:
    """Runs one micro-step; returns its share of the global batch's mean loss, ()."""
    loss = backend.loss(rows[number].to(backend.device)) / max(1, labels)
    backend.backward(loss, last=number == len(rows) - 1)
    return loss.detach().double()


def _check_rejects(totals: Totals, settings: LoopSettings) -> None:
    if totals.rejects > settings.max_reject_rate * totals.samples:
        raise RunFailed(
            f"{totals.rejects} of {totals.samples} samples could not be used, more than `max_reject_rate` "
            f"({settings.max_reject_rate:g}); {settings.rejects_path} lists them"
        )


def _unusable(
    backend: Backend,
    prepared: Prepared,
    settings: LoopSettings,
    totals: Totals,
    loss: float,
    norm: float,
) -> bool:
    """Returns whether the step is to be skipped. Raises RunFailed where it may not be.

    All workers have the same figures and so decide alike.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        if not settings.skip_spikes or len(totals.norms) < 10:
            return False
        return norm > settings.skip_spikes * statistics.median(totals.norms)
    if settings.skip_spikes:
        return True
    names = backend.gather(prepared.ids)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise RunFailed(
        f"the loss of step {prepared.step + 1} is {loss:g}, its gradient norm {norm:g}; its samples are "
        f"{shown}: look at them, lower the learning rate, or set `skip_spikes`"
    )
