"""Counts the floating point operations that a step needs, by what really trains."""

from dataclasses import dataclass

import torch
from torch import nn

from sharegpt4v.models.freeze import Part, part_of

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second (vendor's data sheets), by a part of the device's name."""


@dataclass(frozen=True, slots=True)
class Work:
    """Weights in matrices by part without the head, and those of them that train.

    head_trained: the head's weights if they train, 0 otherwise. Recomputed activations are not counted: that
    makes the figure model, not hardware, utilisation.
    """

    matrices: dict[Part, int]
    trained: dict[Part, int]
    head: int
    head_trained: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: nn.Module, text_config: object) -> "Work":
        matrices: dict[Part, int] = {"vision": 0, "projector": 0, "language": 0}
        trained = dict(matrices)
        head = head_trained = 0
        for name, parameter in model.named_parameters():
            numel = getattr(parameter, "ds_numel", parameter.numel())
            if "lm_head" in name:
                head, head_trained = numel, numel if parameter.requires_grad else 0
            elif parameter.ndim >= 2 and "embed_tokens" not in name:
                matrices[part_of(name)] += numel
                trained[part_of(name)] += numel if parameter.requires_grad else 0
        layers, width = text_config.num_hidden_layers, text_config.hidden_size  # type: ignore[attr-defined]
        return cls(matrices, trained, head, head_trained, layers, width)

    def operations(self, lengths: list[int], labels: int, images: int, patches: int, queries: int) -> float:
        """Counts forward and backward pass of a step.

        lengths: tokens of each dialogue. patches: of an image in the tower. queries: image tokens of one.
        """
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        language = 2.0 * self.matrices["language"] * tokens + 2.0 * self.head * labels
        attention = 2.0 * self.layers * self.width * squares  # two products, half of them masked
        weights = 2.0 * self.trained["language"] * tokens + 2.0 * self.head_trained * labels
        total = language + attention + (language + 2 * attention) + weights
        total += 6.0 * self.matrices["projector"] * images * queries
        vision = 2.0 * images * patches
        return total + vision * self.matrices["vision"] + 2 * vision * self.trained["vision"]


def peak_operations(device: torch.device) -> float | None:
    """Returns the device's peak in operations per second; None for one that is not listed, and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
