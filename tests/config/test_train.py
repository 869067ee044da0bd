"""The recipes of the four stages, value by value (reference, 1 and 5)."""

import subprocess
import sys
from pathlib import Path

import pytest

from sharegpt4v.config.base import resolve
from sharegpt4v.config.train import CONFIGS, STAGES, StageName, TrainConfig
from sharegpt4v.config.yaml_file import load_yaml
from sharegpt4v.errors import UserError


def preset(stage: StageName, name: str, **given: object) -> TrainConfig:
    values = CONFIGS[stage].presets[name].values
    return resolve(CONFIGS[stage], values, {"data": ["a.json"], "out": "run"} | given)


@pytest.mark.parametrize(
    ("stage", "rate", "batch", "template", "protocol", "epochs"),
    [
        ("captioner", 2e-5, 1024, "captioner", "squash", 2),
        ("align", 1e-3, 256, "plain", "crop", 1),
        ("pretrain", 2e-5, 256, "plain", "crop", 1),
        ("sft", 2e-5, 128, "vicuna_v1", "pad", 1),
    ],
)
def test_the_recipe_of_a_stage_at_full_size(
    stage: StageName, rate: float, batch: int, template: str, protocol: str, epochs: float
) -> None:
    config = preset(stage, "7b")
    assert (config.learning_rate, config.batch_size) == (rate, batch)
    assert (STAGES[stage].template, config.protocol, config.epochs) == (template, protocol, epochs)
    assert (config.max_length, config.dtype, config.gradient_checkpointing, config.seed) == (
        2048,
        "bfloat16",
        True,
        42,
    )


@pytest.mark.parametrize("stage", ["align", "pretrain", "sft"])
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_released_stages_share_their_optimizer(stage: StageName, size: str) -> None:
    config = preset(stage, size)
    assert (config.weight_decay, config.beta2, config.warmup_ratio, config.clip) == (0, 0.999, 0.03, 0)
    assert config.optimizer == "adamw" and config.init is None


def test_the_captioner_follows_the_nearest_public_recipe_of_its_family() -> None:
    config = preset("captioner", "7b")
    assert (config.weight_decay, config.beta2, config.warmup_ratio, config.clip) == (0.1, 0.95, 0.01, 1)


def test_pre_training_begins_at_the_paper_s_block() -> None:
    assert preset("pretrain", "7b").first_block == 12


def test_every_preset_of_every_stage_resolves() -> None:
    for stage, config_class in CONFIGS.items():
        for name in config_class.presets:
            assert preset(stage, name).stage is STAGES[stage]


def test_an_unknown_number_of_workers_is_refused() -> None:
    with pytest.raises(UserError, match="^workers: '0' is refused: expected auto, or a number"):
        preset("sft", "toy", workers="0")


def test_packing_is_switched_off_by_a_word_and_no_switch(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("packing: off\n")
    assert load_yaml(tmp_path / "train.yaml") == {"packing": "off"}  # as YAML 1.2 has it
    assert preset("sft", "toy", packing="off").packing == "off"
    for refused in (False, "rows"):
        with pytest.raises(UserError, match="^packing: "):
            preset("sft", "toy", packing=refused)


def test_recipes_are_read_without_torch() -> None:
    code = "import sharegpt4v.config.train, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
