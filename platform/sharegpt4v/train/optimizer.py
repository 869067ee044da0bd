"""Learning rates and optimizers by part of the model, and the schedule that all of them follow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sharegpt4v.models.freeze import Part, part_of

_TABLES = (
    "embed_tokens",
    "lm_head",
    "position_embedding",
    "class_embedding",
    "resampler.query",
    "query_tokens",
    *("lora_a", "lora_b"),
)
"""Tables of vectors, and halves of linear maps: Muon is made for whole ones."""


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """rates: peak of each part. matrix_rate: of what Muon trains. clip: largest gradient norm, 0 none."""

    kind: Literal["adamw", "muon"]
    rates: Mapping[Part, float]
    matrix_rate: float
    beta2: float
    weight_decay: float
    clip: float


def parameter_groups(
    model: nn.Module, settings: OptimizerSettings, *, matrices: bool
) -> list[dict[str, Any]]:
    """Returns what trains as optimizer groups, one a part, each with its peak rate as `lr` and `peak`.

    matrices: what Muon trains, or all the rest; with AdamW alone the rest is everything.
    """
    groups: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _is_matrix(name, parameter, settings) == matrices:
            groups.setdefault(part_of(name), []).append(parameter)
    found: list[dict[str, Any]] = []
    for part, parameters in groups.items():
        peak = settings.matrix_rate if matrices else settings.rates[part]
        found.append({"params": parameters, "lr": peak, "peak": peak, "part": part})
    return found


def _is_matrix(name: str, parameter: nn.Parameter, settings: OptimizerSettings) -> bool:
    if settings.kind != "muon":
        return False
    return parameter.ndim == 2 and not any(table in name for table in _TABLES)


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Returns AdamW for the model, with Muon before it for the matrices of layers where that is asked for."""
    optimizers: list[torch.optim.Optimizer] = []
    if settings.kind == "muon" and (groups := parameter_groups(model, settings, matrices=True)):
        decay = settings.weight_decay
        optimizers.append(
            torch.optim.Muon(
                groups, lr=settings.matrix_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if groups := parameter_groups(model, settings, matrices=False):
        betas = (0.9, settings.beta2)
        optimizers.append(torch.optim.AdamW(groups, betas=betas, weight_decay=settings.weight_decay))
    return optimizers


def rate_share(step: int, steps: int, warmup_ratio: float) -> float:
    """Returns the share of the peak rate in a step: a linear rise, then half a cosine to zero.

    As transformers' cosine schedule has it, but the first step has a rate above zero.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
