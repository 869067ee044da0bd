"""The folder that vLLM loads: the checkpoint, or a copy in this node's cache when vLLM cannot read it."""

import logging
import math
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sharegpt4v.checkpoints.cache import cached
from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.checkpoints.metadata import write_json
from sharegpt4v.checkpoints.reader import Checkpoint, TensorRef, read_json
from sharegpt4v.checkpoints.rules import renamed, write
from sharegpt4v.models.load import FAMILIES

log = logging.getLogger(__name__)

_SHARD_BYTES = 5_000_000_000

_LAYOUT = 2
"""Part of a copy's name: increase it when the written content changes, so that old copies are not used."""

_DECODER = "language_model."
"""Where a Share-Captioner keeps its Llama decoder."""

_UNREADABLE = re.compile(r"(?:model\.)?vision_tower\.(?!vision_model\.)")
"""Tensor names that transformers 5 writes for a vision tower and vLLM 0.32 refuses (reference, 3)."""

_BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def vllm_folder(folder: Path, model: str) -> Path:
    """Returns `folder` if vLLM reads it (LLaVA with the older names and a processor), else a copy for it.

    Folders of families other than ours are vLLM's to read. The copy of LLaVA is what `sharegpt4v convert`
    writes; that of a Share-Captioner is only the decoder, a plain Llama. model: name@digest of what the
    folder holds; the copy is kept under the digest.
    """
    kind = read_json(folder / "config.json").get("model_type")
    captioner = kind == "share_captioner"
    if kind not in FAMILIES or (not captioner and _is_readable(folder)):
        return folder
    name = f"vllm/{model.rpartition('@')[2]}-{_LAYOUT}"
    return cached(name, partial(_write_decoder if captioner else _write_llava, folder))


def _is_readable(folder: Path) -> bool:
    processor = any(
        (folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")
    )
    return processor and not any(_UNREADABLE.match(name) for name in Checkpoint(folder).tensors)


def _announce(why: str, tensors: Mapping[str, TensorRef], folder: Path, target: Path) -> None:
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    log.warning("%s: copies %.2f GB of %s to %s", why, size / 1e9, folder, target.with_suffix(""))


def _write_llava(folder: Path, target: Path) -> None:
    _announce("vLLM reads other names or needs a processor", Checkpoint(folder).tensors, folder, target)
    convert(plan_conversion(folder), target, _SHARD_BYTES)


def _write_decoder(folder: Path, target: Path) -> None:
    """Writes the decoder of a Share-Captioner in the dtype of its files."""
    target.mkdir()
    checkpoint = Checkpoint(folder)
    tensors = {name: t for name, t in checkpoint.tensors.items() if name.startswith(_DECODER)}
    _announce("vLLM runs the decoder alone", tensors, folder, target)
    rules = [renamed(name.removeprefix(_DECODER), name, t.shape) for name, t in tensors.items()]
    write(rules, tensors, target, _SHARD_BYTES)
    content = checkpoint.config()
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    text = content["text_config"] | {"dtype": stored, "architectures": ["LlamaForCausalLM"]}
    write_json(target / "config.json", {"model_type": "llama"} | text)
    for name in _BESIDE_WEIGHTS:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
