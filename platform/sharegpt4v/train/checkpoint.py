"""Checkpoints of a training run: complete or not there, written beside training, the newest K kept.

A checkpoint is a folder `step-NNNNNNNN` with one safetensors file a worker and meta.json. The tensors are
float32 by parameter name, each written by one of the workers, so any number of workers reads them again.
"""

import errno
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sharegpt4v.atomic import publish, sync
from sharegpt4v.run.disk import full_disk_named
from sharegpt4v.train.backend import Backend, ParameterState

_NAME = re.compile(r"step-(\d{8})")
_META = "meta.json"


@dataclass
class _Pending:
    """A checkpoint that is being written. error: what went wrong on this worker."""

    step: int
    thread: threading.Thread
    error: list[BaseException] = field(default_factory=list)


class Checkpoints:
    """The checkpoints below `folder`, which every worker sees. keep: how many of the newest stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._pending: _Pending | None = None

    def newest(self) -> Path | None:
        """Returns the newest complete checkpoint."""
        found = self.complete()
        return found[-1] if found else None

    def complete(self) -> list[Path]:
        """Returns the complete checkpoints, the oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def begin(self, step: int, backend: Backend, meta: dict[str, Any]) -> None:
        """Copies this worker's share of the state and writes it beside training; `settle` completes it.

        meta: kept as JSON, the same on all workers. An earlier checkpoint must be settled.
        """
        assert self._pending is None
        share: dict[str, Tensor] = {}
        for place, (name, tensors) in enumerate(backend.state()):
            if place % backend.workers == backend.worker:
                share |= {f"{name}/{key}": _own_copy(tensor) for key, tensor in tensors.items()}
        partial = self._partial(step)
        if backend.worker == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)
        backend.meet(f"the checkpoint of step {step}")
        name = f"worker-{backend.worker:05}-of-{backend.workers:05}.safetensors"
        text = json.dumps(meta | {"step": step, "workers": backend.workers}) if backend.worker == 0 else ""
        errors: list[BaseException] = []
        thread = threading.Thread(target=_write, args=(partial, name, share, text, errors), daemon=True)
        self._pending = _Pending(step, thread, errors)
        thread.start()

    @property
    def written(self) -> bool:
        """Whether this worker has nothing left to write of the pending checkpoint, if there is one."""
        return self._pending is not None and not self._pending.thread.is_alive()

    @property
    def pending(self) -> bool:
        return self._pending is not None

    def settle(self, backend: Backend) -> Path | None:
        """Waits for the pending checkpoint and gives it its name. Called by all workers together.

        Raises RunFailed for a full disk, OSError, and on the other workers RuntimeError; the checkpoints
        before stay as they are.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        pending.thread.join()
        failed = backend.total([float(bool(pending.error))])[0]
        partial, final = self._partial(pending.step), self.folder / f"step-{pending.step:08}"
        if pending.error:
            with full_disk_named(
                partial, "the last checkpoint is whole, and the same command goes on from it"
            ):
                raise pending.error[0]
        if failed:
            raise RuntimeError(f"another worker could not write {partial}")  # it says why itself
        if backend.worker == 0:
            with full_disk_named(final):
                publish(partial, final)
            for old in self.complete()[: -self.keep]:
                _remove(old)
        backend.meet("the step after a checkpoint")
        return final

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08}.partial"


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Returns what `begin` was given, `step` and `workers`."""
    meta: dict[str, Any] = json.loads((checkpoint / _META).read_text(encoding="utf-8"))
    return meta


def read_state(checkpoint: Path) -> dict[str, ParameterState]:
    """Reads the state of all parameters; tensors are mapped from the files where that is possible."""
    state: dict[str, ParameterState] = {}
    for key, tensor in _tensors(checkpoint):
        name, _, kind = key.rpartition("/")
        state.setdefault(name, {})[kind] = tensor
    return state


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(checkpoint.glob("worker-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)


def _own_copy(tensor: Tensor) -> Tensor:
    """Copies to main memory: the next step overwrites the tensor while it is being written."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor.detach())


def _write(folder: Path, name: str, share: dict[str, Tensor], meta: str, errors: list[BaseException]) -> None:
    try:
        save_file(share, folder / name)
        sync(folder / name)
        if meta:
            (folder / _META).write_text(meta, encoding="utf-8")
    except SafetensorError as error:  # the system's error is in its text alone
        full = "os error 28" in str(error) or "No space left" in str(error)
        errors.append(OSError(errno.ENOSPC if full else errno.EIO, str(error), str(folder / name)))
    except BaseException as error:  # raised again by `settle`, in the thread that trains
        errors.append(error)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; it first loses its name, so that half of it is never taken for one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
