"""What the real chain begins from, at toy size: CLIP, Vicuna and InternLM-XComposer, trained from nothing.

The tower, and the vision and sampler of the captioner, are pre-trained by contrast (toy/contrast.py). The
language model is pre-trained on text alone: exercises of recall, then dialogues about scenes in words. The
captioner gets it with biases of zero. No part has seen an image together with the answer to a question. Every
scene is new, so nothing is learned by heart; the same seed gives the same weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sharegpt4v.dialogue import Image
from sharegpt4v.models.adapter import CLIP_MEAN, CLIP_STD
from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.toy import VOCAB_SIZE, toy_captioner_config, toy_lmm_config
from sharegpt4v.toy.cells import Region
from sharegpt4v.toy.contrast import RegionContrast
from sharegpt4v.toy.shipped import write_half
from sharegpt4v.toy.shown import Length, Pictures, Texts
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.train.collate import Batch, collate
from sharegpt4v.train.optimizer import OptimizerSettings, make_optimizers, rate_share

_SEED = 0
_WARMUP = 0.03
_RATE, _MATRIX_RATE = 3e-3, 4e-3
_LINES = 50
"""Steps from one line of progress to the next."""


LENGTHS = {"tower": Length(2000, 64), "language": Length(1150, 32), "captioner": Length(2000, 64)}
"""By part, in the order in which they are made: the captioner takes the language model."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of the log. loss: of this step's batch."""

    step: int
    steps: int
    loss: float
    seconds: float


def make_foundation(folder: Path, lengths: dict[str, Length] = LENGTHS) -> Iterator[tuple[str, Progress]]:
    """Pre-trains the parts in turn and writes each, at half precision, to its folder in `folder`."""
    tokenizer = build_tokenizer()
    for name, length in lengths.items():
        torch.manual_seed(_SEED)
        part = PARTS[name](length, tokenizer)
        for line in _train(part.trained, part.batches, part.loss, length.steps):
            yield name, line
        if name == "captioner":
            _lend_language(part.model, folder / "language")
        write_half(part.model, folder / name)


@dataclass(frozen=True, slots=True)
class _Part:
    """trained: the model, and what only its training needs."""

    model: PreTrainedModel
    trained: nn.Module
    batches: DataLoader[Any]
    loss: Callable[[Any], Tensor]


def _tower(length: Length, tokenizer: PreTrainedTokenizerFast) -> _Part:
    """Prepares CLIP's tower. The features that LLaVA takes, of the last block but one, are contrasted."""
    tower = CLIPVisionModel(toy_lmm_config().vision_config)
    contrast = RegionContrast(tower.config.hidden_size, tokenizer, VOCAB_SIZE)
    layer = toy_lmm_config().vision_feature_layer

    def loss(batch: tuple[Tensor, list[list[Region]]]) -> Tensor:
        states = tower(_normalised(batch[0]), output_hidden_states=True).hidden_states
        return contrast(states[layer][:, 1:], batch[1])  # type: ignore[no-any-return]

    return _Part(tower, nn.ModuleDict({"vision_tower": tower, "contrast": contrast}), _pictures(length), loss)


def _captioner(length: Length, tokenizer: PreTrainedTokenizerFast) -> _Part:
    """Prepares the captioner. Both its patches and its image embeddings are contrasted."""
    model = ShareCaptioner(toy_captioner_config())
    model.language_model.requires_grad_(False)
    patches = RegionContrast(model.config.vision_config.hidden_size, tokenizer, VOCAB_SIZE)
    embeddings = RegionContrast(model.config.text_config.hidden_size, tokenizer, VOCAB_SIZE)

    def loss(batch: tuple[Tensor, list[list[Region]]]) -> Tensor:
        seen = model.vision_model(_normalised(batch[0])).last_hidden_state[:, 1:]
        sampled = model.projection(model.resampler(seen))
        return patches(seen, batch[1]) + embeddings(sampled, batch[1])  # type: ignore[no-any-return]

    trained = nn.ModuleDict({"model": model, "patches": patches, "embeddings": embeddings})
    return _Part(model, trained, _pictures(length), loss)


def _language(length: Length, tokenizer: PreTrainedTokenizerFast) -> _Part:
    model = LlamaForCausalLM(toy_lmm_config().text_config)

    def loss(batch: Batch) -> Tensor:
        return model(input_ids=batch.input_ids, labels=batch.labels).loss  # type: ignore[no-any-return]

    texts = DataLoader(Texts(length, tokenizer), length.batch_size, collate_fn=collate)
    return _Part(model, model, texts, loss)


PARTS = {"tower": _tower, "language": _language, "captioner": _captioner}


def _pictures(length: Length) -> DataLoader[Any]:
    # Renders on a second core while this one trains.
    return DataLoader(
        Pictures(length), length.batch_size, collate_fn=_joined, num_workers=1, prefetch_factor=4
    )


def _joined(items: Sequence[tuple[Image, list[Region]]]) -> tuple[Tensor, list[list[Region]]]:
    return torch.from_numpy(np.stack([pixels for pixels, _ in items])), [found for _, found in items]


def _normalised(pixels: Tensor) -> Tensor:
    """Normalises as CLIP: (B, S, S, 3) uint8 -> (B, 3, S, S) float32."""
    return ((pixels / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)


def _train(
    trained: nn.Module, batches: DataLoader[Any], loss_of: Callable[[Any], Tensor], steps: int
) -> Iterator[Progress]:
    rates = OptimizerSettings(
        "muon", dict.fromkeys(("vision", "projector", "language"), _RATE), _MATRIX_RATE, 0.95, 0.05, 1.0
    )
    optimizers = make_optimizers(trained, rates)
    started = time.monotonic()
    for step, batch in enumerate(batches):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * rate_share(step, steps, _WARMUP)
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained.parameters(), rates.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % _LINES == 0 or step + 1 == steps:
            yield Progress(step + 1, steps, loss.item(), time.monotonic() - started)


def _lend_language(captioner: PreTrainedModel, folder: Path) -> None:
    """Copies the language model of `folder` into the captioner's, whose biases become zero."""
    language = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    left = captioner.language_model.load_state_dict(language.state_dict(), strict=False)
    with torch.no_grad():
        for name in left.missing_keys:  # the biases of attention, which Vicuna has not
            captioner.language_model.get_parameter(name).zero_()
