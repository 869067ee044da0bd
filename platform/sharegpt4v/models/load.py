"""Loads a transformers folder as the adapter of its model family."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter, CaptionerAdapter, LmmAdapter
from sharegpt4v.models.captioner import IMAGE_PLACEHOLDER, ShareCaptioner, ShareCaptionerConfig
from sharegpt4v.templates import TEMPLATES, Template

Model = TypeVar("Model", bound=PreTrainedModel)


def _load_captioner(folder: Path, dtype: torch.dtype, device: str) -> Adapter:
    model = load_strictly(ShareCaptioner, folder, dtype).to(device)
    return CaptionerAdapter(folder, model, captioner_template(_plain_tokenizer(folder), model.config))


def _load_lmm(folder: Path, dtype: torch.dtype, device: str) -> Adapter:
    model = load_strictly(LlavaForConditionalGeneration, folder, dtype).to(device)
    return LmmAdapter(folder, model, lmm_template(_plain_tokenizer(folder), model.config))


def captioner_template(tokenizer: PreTrainedTokenizerFast, config: ShareCaptionerConfig) -> Template:
    """Returns Share-Captioner's template with the number of image tokens of its sampler."""
    return TEMPLATES["captioner"](tokenizer, IMAGE_PLACEHOLDER, config.image_tokens)


def lmm_template(
    tokenizer: PreTrainedTokenizerFast, config: LlavaConfig, name: str = "vicuna_v1"
) -> Template:
    """Returns the chat template of a LLaVA-shaped model, or another of TEMPLATES by its name."""
    return TEMPLATES[name](tokenizer, config.image_token_id, config.image_seq_length)


_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_strictly(
    family: type[Model], folder: Path, dtype: torch.dtype, faults: Sequence[str] = _FAULTS
) -> Model:
    """Loads by from_pretrained. Raises UserError for a missing, surplus or misshapen tensor.

    faults: those of _FAULTS that are refused.
    """
    model: Model
    model, info = family.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
    )
    for fault in faults:
        if info[fault]:
            names = sorted(map(str, info[fault]))
            raise UserError(
                f"{folder}: {len(names)} {fault.replace('_', ' ')}, {names[0]} first; copy it again"
            )
    model.eval()
    return model


def _plain_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    # Without split_special_tokens </s> or <image> quoted in a prompt would be encoded as the token.
    return PreTrainedTokenizerFast.from_pretrained(folder, split_special_tokens=True)


FAMILIES: dict[str, Callable[..., Adapter]] = {"share_captioner": _load_captioner, "llava": _load_lmm}
"""Loader by `model_type` of config.json."""


def load_adapter(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Adapter:
    """Loads the model in a transformers folder (config.json, safetensors, tokenizer) for an engine.

    Raises UserError for a folder without config.json or an unknown family.
    """
    folder = Path(folder)
    try:
        family = json.loads((folder / "config.json").read_text()).get("model_type")
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: give a transformers folder", field="model") from None
    if family not in FAMILIES:
        raise UserError(
            f"{folder} holds a {family!r} model; we can run {' and '.join(FAMILIES)}", field="model"
        )
    return FAMILIES[family](folder, dtype, device)


def load_without_decoder(folder: Path, dtype: torch.dtype, device: str) -> Adapter:
    """Loads the adapter for an engine with a decoder of its own; the adapter's decoder cannot be run.

    No weight of LLaVA is read: its tensors are on the meta device, and only prompts and checks work. A
    Share-Captioner keeps vision tower, sampler and word embeddings; its decoder is not copied to the device.
    """
    if json.loads((folder / "config.json").read_text()).get("model_type") == "llava":
        with torch.device("meta"):
            lmm = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder))
        if (folder / "generation_config.json").exists():  # from_pretrained reads it, the constructor does not
            lmm.generation_config = GenerationConfig.from_pretrained(folder)
        return LmmAdapter(folder, lmm.to(dtype), lmm_template(_plain_tokenizer(folder), lmm.config))
    captioner = load_strictly(ShareCaptioner, folder, dtype)
    captioner.language_model.model.layers = nn.ModuleList()
    captioner.language_model.lm_head = nn.Identity()
    template = captioner_template(_plain_tokenizer(folder), captioner.config)
    return CaptionerAdapter(folder, captioner.to(device), template)
