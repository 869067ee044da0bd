"""Joins dialogues with ids, labels and images into one row, packed or padded, or one batch, of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
class PackedRow:
    """Dialogues one after another, T tokens and N images in all.

    input_ids: (1, T) int64. labels: (1, T) int64, IGNORE_INDEX outside answers. position_ids: (1, T) int64,
    from 0 in each dialogue. lengths: tokens of each dialogue. width: tokens that each takes with its padding
    behind it, None without padding.
    pixels: (N, S, S, 3) uint8, row after row; (0, 0, 0, 3) where no dialogue has an image.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    pixels: Tensor
    width: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the dialogues, their padding left out."""
        return sum(self.lengths)

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens that attention keeps together, one number a dialogue: its length, or its padded width."""
        return self.lengths if self.width is None else (self.width,) * len(self.lengths)

    @property
    def label_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> "PackedRow":
        """Copies the tensors to a device, without waiting for the copy."""
        names = ("input_ids", "labels", "position_ids", "pixels")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


def pack(samples: Sequence[Sample]) -> PackedRow:
    """Joins samples into one row. A dialogue's first token has no label, so none is predicted across."""
    images = [image for sample in samples for image in sample.images]
    lengths = tuple(len(sample.ids.input_ids) for sample in samples)
    return PackedRow(
        input_ids=torch.tensor([[token for sample in samples for token in sample.ids.input_ids]]),
        labels=torch.tensor([[label for sample in samples for label in sample.ids.labels]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths=lengths,
        pixels=torch.from_numpy(np.stack(images) if images else np.empty((0, 0, 0, 3), np.uint8)),
    )


def without_labels(sample: Sample) -> Sample:
    """Returns a sample that adds nothing to the loss, for a worker that has no other in a micro-step."""
    ids = sample.ids
    return Sample(TrainingIds(ids.input_ids, [IGNORE_INDEX] * len(ids.labels)), sample.images)


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


def pad(samples: Sequence[Sample]) -> PackedRow:
    """Joins samples into one row in which each takes the tokens of the longest, as a padded batch has it."""
    batch = collate(samples)
    count, width = batch.input_ids.shape
    return PackedRow(
        input_ids=batch.input_ids.reshape(1, -1),
        labels=batch.labels.reshape(1, -1),
        position_ids=torch.arange(width).repeat(count)[None],
        lengths=tuple(len(sample.ids.input_ids) for sample in samples),
        pixels=batch.pixels,
        width=width,
    )
