"""Dialogues of any length and any number of images as one batch."""

import numpy as np
import torch

from sharegpt4v.dialogue import Image
from sharegpt4v.templates import IGNORE_INDEX, TrainingIds
from sharegpt4v.train.collate import Sample, collate


def shade(value: int) -> Image:
    return np.full((4, 4, 3), value, np.uint8)


def test_short_rows_are_padded_on_the_right_and_padding_has_no_label() -> None:
    short, long = TrainingIds([1, 9], [IGNORE_INDEX, 9]), TrainingIds([1, 5, 6], [1, 5, 6])
    batch = collate([Sample(short, ()), Sample(long, ())])
    assert batch.input_ids.tolist() == [[1, 9, 0], [1, 5, 6]]
    assert batch.labels.tolist() == [[IGNORE_INDEX, 9, IGNORE_INDEX], [1, 5, 6]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_images_of_all_rows_are_stacked_in_the_order_of_their_places() -> None:
    ids = TrainingIds([1], [1])
    batch = collate([Sample(ids, (shade(3), shade(1))), Sample(ids, ()), Sample(ids, (shade(2),))])
    assert batch.pixels.shape == (3, 4, 4, 3) and batch.pixels.dtype == torch.uint8
    assert batch.pixels[:, 0, 0, 0].tolist() == [3, 1, 2]


def test_a_batch_of_text_alone_has_no_pixels() -> None:
    assert collate([Sample(TrainingIds([1], [1]), ())]).pixels.shape == (0, 0, 0, 3)
