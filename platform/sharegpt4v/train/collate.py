"""Collates dialogues with ids and labels into one batch of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharegpt4v.dialogue import Image
from sharegpt4v.templates import IGNORE_INDEX, TrainingIds


@dataclass(frozen=True, slots=True)
class Sample:
    """One dialogue to train on. images: (S, S, 3) uint8 each, in the order of their positions in the ids."""

    ids: TrainingIds
    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """B dialogues, T tokens in the longest, N images in all.

    pixels: (N, S, S, 3) uint8, row after row; (0, 0, 0, 3) where no row has an image.
    input_ids: (B, T) int64. labels: (B, T) int64, IGNORE_INDEX outside answers and in the padding.
    """

    pixels: Tensor
    input_ids: Tensor
    labels: Tensor


def collate(samples: Sequence[Sample]) -> Batch:
    """Pads rows on the right, which causal attention never reads, so no attention mask is needed."""
    images = [image for sample in samples for image in sample.images]
    return Batch(
        pixels=torch.from_numpy(np.stack(images) if images else np.empty((0, 0, 0, 3), np.uint8)),
        input_ids=_padded([sample.ids.input_ids for sample in samples], 0),
        labels=_padded([sample.ids.labels for sample in samples], IGNORE_INDEX),
    )


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """Pads rows on the right with `value`: (B, T) int64."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
