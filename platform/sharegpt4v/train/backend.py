"""What the training loop needs of whatever computes gradients, and plain torch as one answer.

The other is DeepSpeed (deepspeed_backend.py). The state of a run is the same for both: float32 tensors by
parameter name, so a checkpoint resumes on any number of workers and on the other backend.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharegpt4v.errors import RunFailed
from sharegpt4v.train.collate import PackedRow
from sharegpt4v.train.optimizer import OptimizerSettings, make_optimizers
from sharegpt4v.train.packed_model import PackedModel

ParameterState = dict[str, Tensor]
"""`value` float32 and what the optimizer keeps of one parameter, of its shape or () for counts."""


class Backend(Protocol):
    """One worker's side of training; every method but `loss` is called by all workers together."""

    worker: int
    workers: int
    device: torch.device

    def loss(self, row: PackedRow) -> Tensor:
        """Computes the sum of the cross entropy of a row, ()."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a share of the global batch's loss. last: of this step."""
        ...

    def gradient_norm(self) -> float:
        """Computes the norm over all workers, after the last backward pass of a step.

        Infinite or not a number where a gradient is.
        """
        ...

    def update(self, share: float, norm: float) -> None:
        """Changes the parameters at this share of the peak rates. norm: of the gradients, a finite one."""
        ...

    def discard(self) -> None:
        """Forgets the gradients of this step."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Keeps every parameter whole on every worker within, for other uses than a training step."""
        ...

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums numbers over the workers."""
        ...

    def meet(self, what: str) -> None:
        """Waits for all workers; raises RunFailed that names those who do not come. what: to do next."""
        ...

    def gather(self, texts: Sequence[str]) -> list[str]:
        """Joins the texts of all workers."""
        ...

    def state(self) -> Iterator[tuple[str, ParameterState]]:
        """Yields what training needs of each parameter that trains; complete on every worker."""
        ...

    def restore(self, state: Mapping[str, ParameterState]) -> None:
        """Takes the state of a checkpoint."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every parameter of `model`, whole, trained or not."""
        ...


class Workers:
    """The workers of a process group, or this process alone.

    Gloo names a worker that does not come to a meeting, NCCL would wait: meetings have a group of their own.
    hang_seconds: after which a worker counts as hung.
    """

    def __init__(self, hang_seconds: float) -> None:
        self.many = dist.is_available() and dist.is_initialized()
        self.worker = dist.get_rank() if self.many else 0
        self.workers = dist.get_world_size() if self.many else 1
        self._patience = hang_seconds
        self._group = dist.new_group(backend="gloo") if self.many else None

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums numbers over the workers, in float64."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.many:
            dist.all_reduce(numbers, group=self._group)
        return [float(number) for number in numbers]

    def gather(self, texts: Sequence[str]) -> list[str]:
        """Joins the texts of all workers, in the order of the workers."""
        if not self.many:
            return list(texts)
        found: list[list[str]] = [[] for _ in range(self.workers)]
        dist.all_gather_object(found, list(texts), group=self._group)
        return [text for each in found for text in each]

    def meet(self, what: str) -> None:
        """Waits for all workers. Raises RunFailed that names those who do not come in time.

        For one that died it raises RuntimeError, at once: Ray then starts all of them again.
        """
        if self.workers == 1:
            return
        begun = time.monotonic()
        try:
            dist.monitored_barrier(self._group, timedelta(seconds=self._patience), wait_all_ranks=True)
        except RuntimeError as error:
            if time.monotonic() - begun < 0.9 * self._patience:
                raise
            line = " ".join(str(error).split())[:200]
            raise RunFailed(
                f"workers did not all come to {what} within {self._patience:g} s ({line}): run the same "
                "command again"
            ) from error


class PlainBackend:
    """Plain torch: every worker holds everything, and gradients are summed once a step."""

    def __init__(self, model: PackedModel, settings: OptimizerSettings, hang_seconds: float = 1800.0) -> None:
        self._model, self._settings = model, settings
        self._group = Workers(hang_seconds)
        self.worker, self.workers = self._group.worker, self._group.workers
        self.device = model.adapter.device
        self._trained = [(n, p) for n, p in model.model.named_parameters() if p.requires_grad]
        self._buckets = list(_buckets([p for _, p in self._trained]))
        self._optimizers = make_optimizers(model.model, settings)
        self.total, self.meet, self.gather = self._group.total, self._group.meet, self._group.gather

    def loss(self, row: PackedRow) -> Tensor:
        loss: Tensor = self._model(row)
        return loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)
        if last and self._group.many:
            for bucket in self._buckets:
                _sum_gradients(bucket)

    def gradient_norm(self) -> float:
        gradients = [p.grad for _, p in self._trained if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def update(self, share: float, norm: float) -> None:
        if self._settings.clip:
            parameters = [p for _, p in self._trained]
            torch.nn.utils.clip_grads_with_norm_(parameters, self._settings.clip, torch.tensor(norm))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
        self.discard()

    def discard(self) -> None:
        for _, parameter in self._trained:
            parameter.grad = None

    def whole(self) -> AbstractContextManager[object]:
        return nullcontext()

    def state(self) -> Iterator[tuple[str, ParameterState]]:
        for name, parameter in self._trained:
            kept: dict[str, object] = next(
                (o.state[parameter] for o in self._optimizers if parameter in o.state), {}
            )
            tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
            yield name, {"value": parameter.detach().float(), **tensors}

    def restore(self, state: Mapping[str, ParameterState]) -> None:
        owner = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self._trained:
            tensors = dict(state[name])
            with torch.no_grad():
                parameter.copy_(tensors.pop("value"))
            if tensors:
                owner[parameter].state[parameter] = {
                    key: value.clone() if value.ndim == 0 else value.to(parameter.device).clone()
                    for key, value in tensors.items()
                }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.model.named_parameters():
            yield name, parameter.detach()


_BUCKET = 16_000_000
"""Numbers of a bucket at most, or one parameter that is larger."""


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups parameters of one type, as every exchange of gradients waits for all workers."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _sum_gradients(bucket: Sequence[nn.Parameter]) -> None:
    """Sums the gradients of some parameters over the workers; zeros where a worker has none."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
        parameter.grad = part.view_as(parameter)
