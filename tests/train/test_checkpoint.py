"""Checkpoints: complete or not there, the newest kept, and a full disk leaves the one before."""

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sharegpt4v.errors import RunFailed
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.shipped import SHIPPED
from sharegpt4v.train import checkpoint
from sharegpt4v.train.backend import PlainBackend
from sharegpt4v.train.checkpoint import Checkpoints, read_meta, read_state
from sharegpt4v.train.optimizer import OptimizerSettings
from sharegpt4v.train.packed_model import PackedModel

SETTINGS = OptimizerSettings(
    "adamw", {"vision": 1e-3, "projector": 1e-3, "language": 1e-3}, 1e-3, 0.99, 0.1, 0
)


@pytest.fixture
def backend() -> PlainBackend:
    model = PackedModel(load_adapter(SHIPPED / "lmm"))
    model.model.requires_grad_(False)
    model.model.model.multi_modal_projector.requires_grad_(True)
    return PlainBackend(model, SETTINGS)


def save(checkpoints: Checkpoints, step: int, backend: PlainBackend) -> None:
    checkpoints.begin(step, backend, {"samples": step})
    checkpoints.settle(backend)


def test_the_newest_ones_are_kept_and_hold_what_trains(tmp_path: Path, backend: PlainBackend) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15):
        save(checkpoints, step, backend)
    assert [path.name for path in checkpoints.complete()] == ["step-00000010", "step-00000015"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    newest = checkpoints.newest()
    assert newest is not None and read_meta(newest)["samples"] == 15
    assert all("multi_modal_projector" in name for name in read_state(newest))


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path, backend: PlainBackend) -> None:
    """It holds the values of its step, not those that a later one has written over them."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    name, tensors = next(backend.state())
    value = tensors["value"].clone()
    checkpoints.begin(1, backend, {})
    parameter = dict(backend._model.model.named_parameters())[name]
    with torch.no_grad():
        parameter += 1
    newest = checkpoints.settle(backend)
    assert newest is not None and torch.equal(read_state(newest)[name]["value"], value)


def test_a_half_written_checkpoint_is_none(tmp_path: Path, backend: PlainBackend) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    save(checkpoints, 1, backend)
    checkpoints.begin(2, backend, {})
    while not checkpoints.written:  # its thread would write on while another begins; a killed one does not
        time.sleep(0.01)
    # And then the process is killed, before the checkpoint has its name.
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    newest = again.newest()
    assert newest is not None and newest.name == "step-00000001"
    save(again, 2, backend)
    assert len(again.complete()) == 2


def test_a_full_disk_leaves_the_one_before(
    tmp_path: Path, backend: PlainBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    save(checkpoints, 1, backend)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match="the disk is full.*the last checkpoint is whole"):
        save(checkpoints, 2, backend)
    newest = Checkpoints(tmp_path / "checkpoints", keep=1).newest()
    assert newest is not None and newest.name == "step-00000001" and read_state(newest)
