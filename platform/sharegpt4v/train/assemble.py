"""Joins a Vicuna, a CLIP tower and a projector in one model to start from, as the real chain begins."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from sharegpt4v.atomic import publish
from sharegpt4v.checkpoints import metadata
from sharegpt4v.checkpoints.llava import padded, written_name
from sharegpt4v.errors import UserError
from sharegpt4v.train.product import write_weights

_SEED = 0
"""Of a projector without a file: the same command begins with the same weights."""


def assemble(language_model: Path, vision_tower: Path, projector: Path | None, folder: Path) -> None:
    """Writes the joined model to `folder`, completely or not at all; one that is there stays as it is.

    `<image>` and `<pad>` get the ids behind the language model's vocabulary unless its tokenizer knows them.
    Raises UserError for parts that are missing or do not fit together.
    """
    if folder.is_dir():
        return
    check_parts(language_model, vision_tower, projector)
    text: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(language_model, dtype="auto")
    tower: CLIPVisionModel = CLIPVisionModel.from_pretrained(vision_tower, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [metadata.IMAGE]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": metadata.PAD})
    config = _config(text.config, tower.config, len(tokenizer), tokenizer)
    torch.manual_seed(_SEED)
    joined = LlavaForConditionalGeneration(config).to(text.dtype)
    joined.model.vision_tower.load_state_dict(tower.state_dict())
    _load_language(joined, text)
    _load_projector(joined.model.multi_modal_projector, projector)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {written_name(n): p.detach().contiguous() for n, p in joined.named_parameters()}
    write_weights(partial, tensors)
    config.architectures = ["LlavaForConditionalGeneration"]
    metadata.write_config(partial, config, text.dtype)
    metadata.write_generation(partial, config.text_config)
    metadata.write_processor(partial, config)
    tokenizer.save_pretrained(partial)
    publish(partial, folder)


def check_parts(language_model: Path, vision_tower: Path, projector: Path | None) -> None:
    """Raises UserError that names the field of a part that is missing or another model; reads no weight."""
    _check_part(language_model, ("llama",), "language_model")
    _check_part(vision_tower, ("clip_vision_model", "clip"), "vision_tower")
    if projector is not None and not projector.is_file():
        raise UserError(f"{projector} is no file", field="projector")


def _check_part(folder: Path, kinds: tuple[str, ...], field: str) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no transformers folder ({error})", field=field) from None
    if kind not in kinds:
        raise UserError(f"{folder} holds a {kind!r} model: give {' or '.join(kinds)}", field=field)


def _config(text: Any, vision: CLIPVisionConfig, tokens: int, tokenizer: Any) -> LlavaConfig:
    text_config = type(text).from_dict(text.to_dict())
    text_config.vocab_size = padded(max(tokens, text.vocab_size))
    text_config.pad_token_id = tokenizer.pad_token_id
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(metadata.IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_protocol="pad",
    )


def _load_language(joined: LlavaForConditionalGeneration, text: LlamaForCausalLM) -> None:
    """Copies decoder and head; rows of tokens that they do not know begin at the mean of the others."""
    decoder = dict(joined.model.language_model.named_parameters())
    with torch.no_grad():
        for name, parameter in text.model.named_parameters():
            _copy_rows(decoder[name], parameter) if "embed_tokens" in name else decoder[name].copy_(parameter)
        _copy_rows(joined.lm_head.weight, text.lm_head.weight)


def _copy_rows(table: Tensor, known: Tensor) -> None:
    table[: len(known)].copy_(known)
    table[len(known) :].copy_(known.float().mean(0))


def _load_projector(projector: nn.Module, path: Path | None) -> None:
    if path is None:
        return
    try:
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}", field="projector") from None
    short = {name.rpartition("projector.")[2]: tensor for name, tensor in tensors.items()}
    names = {"0": "linear_1", "2": "linear_2"}  # as the released files call the two layers
    named = {
        ".".join([names.get(n.split(".")[0], n.split(".")[0]), *n.split(".")[1:]]): t
        for n, t in short.items()
    }
    wanted = {name: tuple(p.shape) for name, p in projector.named_parameters()}
    if {name: tuple(t.shape) for name, t in named.items()} != wanted:
        raise UserError(f"{path} holds {sorted(named)}, and the projector needs {wanted}", field="projector")
    projector.load_state_dict(named)
