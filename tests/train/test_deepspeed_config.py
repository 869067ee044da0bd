"""DeepSpeed's configuration: what it may build, and where the optimizer lives."""

import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.shipped import SHIPPED
from sharegpt4v.train.deepspeed_backend import DeepSpeedBackend, deepspeed_config
from sharegpt4v.train.optimizer import OptimizerSettings, rate_share
from sharegpt4v.train.packed_model import PackedModel

RATES = {"vision": 1e-3, "projector": 1e-3, "language": 1e-3}
ADAMW = OptimizerSettings("adamw", RATES, 1e-3, 0.99, 0.1, 1.0)  # type: ignore[arg-type]


def test_offload_moves_the_optimizer_to_main_memory() -> None:
    config = deepspeed_config(3, ADAMW, workers=8, half=True, offload=True, gpu=True)
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config["bf16"]["enabled"] and config["gradient_clipping"] == 1.0
    without = deepspeed_config(2, ADAMW, workers=8, half=True, offload=False, gpu=True)
    assert "offload_optimizer" not in without["zero_optimization"]


def test_nothing_needs_a_compiler_and_a_step_is_one_batch_of_ours() -> None:
    config = deepspeed_config(2, ADAMW, workers=4, half=False, offload=False, gpu=False)
    assert config["zero_force_ds_cpu_optimizer"] is False and "optimizer" not in config
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (4, 1)


def test_muon_is_refused() -> None:
    model = PackedModel(load_adapter(SHIPPED / "lmm"))
    muon = OptimizerSettings("muon", RATES, 1e-3, 0.99, 0.1, 1.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^optimizer: muon is refused"):
        DeepSpeedBackend(model, muon, 2)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    shares = [rate_share(step, 1000, 0.03) for step in (0, 29, 30, 515, 1000)]
    assert shares == pytest.approx([1 / 30, 1, 1, 0.5, 0])
