"""Selects the tensors that each training stage trains; all others are frozen (reference, 1 and 3)."""

import re
from typing import Literal

from transformers import LlavaForConditionalGeneration

from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import ShareCaptioner

TrainStage = Literal["align", "pretrain", "sft"]

FIRST_BLOCK = 12
"""First vision block that pre-training trains: the best row of the paper's Table 8."""

# transformers 5 has no `vision_model.` level in memory; checkpoints and older versions have it.
_BLOCK = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.")


def freeze(
    model: LlavaForConditionalGeneration, stage: TrainStage, first_block: int = FIRST_BLOCK
) -> list[str]:
    """Sets `requires_grad` of every parameter for one stage.

    align: the projector. pretrain: projector, language model and the vision blocks from `first_block` on
    (the number of blocks, 24, leaves the tower frozen). sft: projector and language model.
    Patch and position embeddings and pre_layrnorm never train. Nor do the modules after the feature
    layer (block 23 and post_layernorm of CLIP-L): they get no gradient, and DDP and ZeRO would wait forever
    for the gradients of parameters that require one. Returns the names that train, in the model's order.

    Raises UserError for an unknown stage or block.
    """
    if stage not in ("align", "pretrain", "sft"):
        raise UserError(f"there is no training stage {stage!r}; choose align, pretrain or sft")
    blocks: int = model.config.vision_config.num_hidden_layers
    if stage == "pretrain" and not 0 <= first_block <= blocks:
        raise UserError(f"first_block is {first_block}; the vision tower has blocks 0 to {blocks - 1}")
    used = range(first_block if stage == "pretrain" else blocks, blocks_with_gradient(model))
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name, stage, used))
        if parameter.requires_grad:
            trained.append(name)
    return trained


def blocks_with_gradient(model: LlavaForConditionalGeneration) -> int:
    """Counts the vision blocks that get a gradient: 23 of 24 with the features of hidden_states[-2]."""
    config = model.config
    layers = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1  # hidden_states[0] are the embeddings
    used: int = max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))
    return used


def _trains(name: str, stage: TrainStage, blocks: range) -> bool:
    if "vision_tower." in name:
        block = _BLOCK.search(name)
        return block is not None and int(block[1]) in blocks
    return stage != "align" or "multi_modal_projector." in name


def freeze_captioner(model: ShareCaptioner) -> list[str]:
    """Sets `requires_grad` for the captioner's stage: everything trains that gets a gradient.

    [unknown] what the release trained; the nearest public recipe of the family trains vision tower and
    sampler too (reference, 4). Returns the names that train, in the model's order.
    """
    model.requires_grad_(True)
    return [name for name, _ in model.named_parameters()]


Part = Literal["vision", "projector", "language"]
"""A part of a model that may have a learning rate of its own; the projector of a captioner is its sampler."""

_VISION = re.compile(r"(?:^|\.)(?:vision_tower|vision_model)\.")
_LANGUAGE = re.compile(r"(?:^|\.)(?:language_model|lm_head)\.")


def part_of(name: str) -> Part:
    """Returns the part that a parameter of either family belongs to."""
    if _VISION.search(name):
        return "vision"
    return "language" if _LANGUAGE.search(name) else "projector"
