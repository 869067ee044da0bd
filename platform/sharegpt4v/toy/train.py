"""Trains a toy model from scratch on scenes rendered as it goes; the same seed gives the same weights.

Every scene is new: step s of batch size b sees scenes s*b .. s*b+b-1 of the training world, so nothing is
learned by heart and no image is stored.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sharegpt4v.dialogue import Turn
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.templates import IGNORE_INDEX
from sharegpt4v.toy.captions import detailed_caption
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.toy.sources import SOURCES
from sharegpt4v.train.collate import Sample, collate

TRAIN_WORLD, UNSEEN_WORLD = 1_000_003, 1_000_033
"""Seeds of scenes; those below a million are left to demos and tests, which see only unseen scenes."""

DIFFICULTIES = (1, 1, 1, 1, 1, 1, 1, 1, 1, 2)
"""Difficulty by batch: mostly what the toy world shows, and a little beyond it."""


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """How a toy model is trained. Learning rates are peaks, after `warmup` steps; then cosine to zero.

    matrix_learning_rate: of the weight matrices, by Muon; learning_rate: of all the rest, by AdamW.
    """

    steps: int
    seed: int = 0
    batch_size: int = 32
    matrix_learning_rate: float = 4e-3
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """One line of the log. exact: share of unseen captions that are right in every word."""

    step: int
    steps: int
    loss: float
    exact: float
    seconds: float


class Scenes(Dataset[Sample]):
    """Scenes of one world as training samples: the prompt about an image, and its detailed caption."""

    def __init__(
        self,
        adapter: Adapter,
        prompt: str,
        count: int,
        seed: int,
        difficulties: tuple[int, ...],
        per_batch: int,
    ) -> None:
        self.seed, self.count, self.difficulties, self.per_batch = seed, count, difficulties, per_batch
        self.size, self.template, self.prompt = adapter.image_size, adapter.template, prompt

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index >= self.count:
            raise IndexError(index)
        source = tuple(SOURCES)[index % len(SOURCES)]
        # Batch by batch: captions of one difficulty are of like length, so little of a batch is padding.
        difficulty = self.difficulties[index // self.per_batch % len(self.difficulties)]
        scene = make_scene(self.seed, index, source=source, difficulty=difficulty)
        pixels = np.array(render(scene, (self.size, self.size)))
        turns = (Turn("user", self.prompt, (pixels,)), Turn("assistant", detailed_caption(scene)))
        return Sample(self.template.example(turns), (pixels,))


def train(adapter: Adapter, prompt: str, recipe: TrainingRecipe) -> Iterator[TrainingProgress]:
    """Trains the adapter's model in place, from whatever it holds; yields progress every 50 steps."""
    torch.manual_seed(recipe.seed)
    model = adapter.model
    optimizers = _optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, recipe))
        for optimizer in optimizers
    ]
    count = recipe.steps * recipe.batch_size
    scenes = Scenes(adapter, prompt, count, TRAIN_WORLD + recipe.seed, DIFFICULTIES, recipe.batch_size)
    # Renders on a second core while this one trains.
    batches = DataLoader(scenes, recipe.batch_size, collate_fn=collate, num_workers=1, prefetch_factor=4)
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        model.train()
        pixel_values = adapter.normalise(batch.pixels)
        loss = model(input_ids=batch.input_ids, pixel_values=pixel_values, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps:
            exact = exact_match(adapter, prompt, scenes=256)
            yield TrainingProgress(step, recipe.steps, loss.item(), exact, time.monotonic() - started)


def _optimizers(model: nn.Module, recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of layers, where it needs half the scenes, and AdamW for the rest.

    Embeddings, heads and queries are tables of vectors and no linear maps, for which Muon is made.
    """
    tables = ("embed_tokens", "lm_head", "position_embedding", "class_embedding", "resampler.query")
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and not any(table in name for table in tables)]
    chosen = {id(parameter) for parameter in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=decay),
    ]


def learning_rate_share(step: int, recipe: TrainingRecipe) -> float:
    """Returns the share of the peak: a linear rise over the warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def exact_match(adapter: Adapter, prompt: str, scenes: int, difficulty: int = 1) -> float:
    """Returns the share of unseen scenes whose greedy caption equals the true one, word for word.

    One pass over the true caption is enough: greedy decoding writes it exactly when every token of it is the
    likeliest after those before.
    """
    adapter.model.eval()
    unseen = Scenes(adapter, prompt, scenes, UNSEEN_WORLD, (difficulty,), per_batch=scenes)
    right = 0
    for batch in DataLoader(unseen, 128, collate_fn=collate):
        pixel_values = adapter.normalise(batch.pixels)
        logits = adapter.model(input_ids=batch.input_ids, pixel_values=pixel_values).logits
        wanted = batch.labels[:, 1:]
        hits = (logits[:, :-1].argmax(-1) == wanted) | (wanted == IGNORE_INDEX)
        right += int(hits.all(dim=1).sum())
    return right / scenes
