"""Exactly the tensors that a stage trains: by name at full size, by gradient on the toy model."""

import re
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sharegpt4v.errors import UserError
from sharegpt4v.models.freeze import TrainStage, freeze
from sharegpt4v.models.lmm import share_gpt4v_config

PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
LANGUAGE_MODEL = {
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.norm.weight",
    *(
        f"model.language_model.layers.{layer}.{part}.weight"
        for layer in range(32)
        for part in (
            *(f"self_attn.{projection}_proj" for projection in "qkvo"),
            *(f"mlp.{projection}_proj" for projection in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
}


def vision_blocks(first: int, last: int) -> set[str]:
    parts = [
        *(f"self_attn.{projection}" for projection in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"),
    ]
    return {
        f"model.vision_tower.encoder.layers.{block}.{part}.{kind}"
        for block in range(first, last + 1)
        for part in parts
        for kind in ("weight", "bias")
    }


@pytest.fixture(scope="module")
def full_size() -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(share_gpt4v_config("7b"))


@pytest.mark.parametrize(
    ("stage", "first_block", "expected"),
    [
        ("align", 12, PROJECTOR),
        ("pretrain", 12, PROJECTOR | LANGUAGE_MODEL | vision_blocks(12, 22)),
        ("pretrain", 0, PROJECTOR | LANGUAGE_MODEL | vision_blocks(0, 22)),
        ("pretrain", 23, PROJECTOR | LANGUAGE_MODEL),
        ("pretrain", 24, PROJECTOR | LANGUAGE_MODEL),
        ("sft", 12, PROJECTOR | LANGUAGE_MODEL),
    ],
)
def test_full_size_trains_exactly_these_tensors(
    full_size: LlavaForConditionalGeneration, stage: TrainStage, first_block: int, expected: set[str]
) -> None:
    trained = freeze(full_size, stage, first_block)
    assert set(trained) == expected
    assert trained == [name for name, p in full_size.named_parameters() if p.requires_grad]


def toy() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(share_gpt4v_config("toy"))


def loss(model: LlavaForConditionalGeneration) -> Any:
    ids = torch.tensor([[1, *[3] * 36, 9, 10, 2]])
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, pixel_values=pixels, labels=ids).loss


@pytest.mark.parametrize("stage", ["align", "pretrain", "sft"])
def test_every_tensor_that_trains_gets_a_gradient_and_no_other_does(stage: TrainStage) -> None:
    model = toy()
    trained = freeze(model, stage, first_block=1)
    loss(model).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == trained
    # Toy: 4 blocks, the last one behind the feature layer.
    blocks = {int(n[1]) for name in trained if (n := re.search(r"encoder\.layers\.(\d+)", name))}
    assert blocks == ({1, 2} if stage == "pretrain" else set())


def test_last_block_and_last_norm_get_no_gradient_even_when_nothing_is_frozen() -> None:
    model = toy()
    loss(model).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    tower = "model.vision_tower."
    last = {name for name, _ in model.named_parameters() if name.startswith(f"{tower}encoder.layers.3.")}
    assert without == last | {f"{tower}post_layernorm.weight", f"{tower}post_layernorm.bias"}


def test_freezing_for_a_later_stage_thaws_what_an_earlier_one_froze() -> None:
    model = toy()
    freeze(model, "align")
    later = freeze(model, "pretrain", first_block=0)
    assert later == freeze(toy(), "pretrain", first_block=0)


def test_older_names_with_the_vision_model_level_are_matched() -> None:
    class Older(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = toy()
            self.config = inner.config
            self.vision_tower = torch.nn.ModuleDict({"vision_model": inner.model.vision_tower})

    trained = freeze(Older(), "pretrain", first_block=2)
    assert len(trained) == 16
    assert all(name.startswith("vision_tower.vision_model.encoder.layers.2.") for name in trained)


def test_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="first_block is 5; the vision tower has blocks 0 to 3"):
        freeze(toy(), "pretrain", first_block=5)


def test_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no training stage 'warmup'; choose align, pretrain or sft"):
        freeze(toy(), "warmup")  # type: ignore[arg-type]
