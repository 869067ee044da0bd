"""Toy models with random weights in a folder, for tests that need shapes and not sense."""

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from sharegpt4v.models.captioner import ImageSampler, ShareCaptioner
from sharegpt4v.models.toy import toy_captioner_config, toy_lmm_config
from sharegpt4v.toy.tokenizer import build_tokenizer


def save_random_captioner(folder: Path, sampler: ImageSampler = "resampler") -> Path:
    """The toy Share-Captioner, seeded, with the toy tokenizer."""
    torch.manual_seed(0)
    return _save(ShareCaptioner(toy_captioner_config(sampler)), folder)


def save_random_lmm(folder: Path) -> Path:
    """The toy ShareGPT4V, seeded, with the toy tokenizer."""
    torch.manual_seed(0)
    return _save(LlavaForConditionalGeneration(toy_lmm_config()), folder)


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
