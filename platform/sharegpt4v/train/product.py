"""Writes the end product of a stage: a transformers folder with weights, processor, tokenizer and card."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from sharegpt4v.atomic import publish
from sharegpt4v.checkpoints import metadata
from sharegpt4v.checkpoints.llava import written_name
from sharegpt4v.models.adapter import Adapter, LmmAdapter

_SHARD = 5_000_000_000
"""Bytes of a weight file at most, as transformers writes them."""

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def write_product(
    folder: Path,
    adapter: Adapter,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    card: Mapping[str, Any],
) -> None:
    """Writes the folder completely or not at all; one that is there is replaced.

    weights: every parameter by its name in memory. card: facts about the training, for people and, as
    training.json, for programs. Raises OSError.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    is_lmm = isinstance(adapter, LmmAdapter)
    tensors = {
        (written_name(name) if is_lmm else name): tensor.to("cpu", dtype).contiguous()
        for name, tensor in weights
    }
    write_weights(partial, tensors)
    config = adapter.model.config
    config.architectures = [type(adapter.model).__name__]
    config.image_protocol = card["protocol"]
    metadata.write_config(partial, config, dtype)
    if is_lmm:
        metadata.write_processor(partial, config)
    for pattern in _TOKENIZER_FILES:
        for path in adapter.folder.glob(pattern):
            shutil.copyfile(path, partial / path.name)
    if not (partial / "generation_config.json").exists():
        metadata.write_generation(partial, config.text_config)
    metadata.write_json(partial / "training.json", card)
    (partial / "README.md").write_text(_readme(card), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    publish(partial, folder)


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes safetensors files of 5 GB at most, with an index where there are several."""
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    for name, members in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in members}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        metadata.write_json(folder / "model.safetensors.index.json", index)


def _readme(card: Mapping[str, Any]) -> str:
    facts = "\n".join(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in card.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n"
        f"# {card['stage']} model\nTrained by `sharegpt4v train {card['stage']}`; the terms of the data "
        f"and of the model it began from apply.\n\n{facts}\n"
    )
