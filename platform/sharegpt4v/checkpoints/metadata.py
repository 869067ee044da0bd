"""The files beside the weights: configuration, generation, processor, tokenizer, chat template, card."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlavaConfig, PreTrainedConfig

from sharegpt4v.checkpoints.family import check_transformers
from sharegpt4v.checkpoints.reader import read_json
from sharegpt4v.checkpoints.released_config import config_errors, still_describes
from sharegpt4v.checkpoints.tokenizer import load_tokenizer
from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import CLIP_MEAN, CLIP_STD
from sharegpt4v.models.captioner import ShareCaptionerConfig

IMAGE, PAD = "<image>", "<pad>"
"""What LLaVA adds to Vicuna's vocabulary."""

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

ORIGINALS = "released"
"""Subfolder with the released JSON and tokenizer files as they came, for the way back."""

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZERS = {"tokenizer.model": "LlamaTokenizer", "tokenizer.json": "PreTrainedTokenizerFast"}
"""Files that a tokenizer can be read from, and the class that reads each."""

_ORIGINAL_FILES = ("config.json", "generation_config.json", *_TOKENIZER_FILES)

_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer that fits its model. source: the folder it came from."""

    tokenizer: Tokenizer
    source: Path


def find_tokenizer(
    source: Path, rows: int, added: Mapping[str, int], known: Sequence[str] = ()
) -> LoadedTokenizer:
    """Returns a tokenizer for a table of `rows`. added: control tokens it gets, with their ids in the model.

    Raises UserError when the folder has none, one that gives the added tokens other ids, one that does not
    know the control tokens in `known`, or one with more tokens than rows.
    """
    tokenizer = load_tokenizer(source, added)
    for token in known:
        if tokenizer.token_to_id(token) is None:
            raise UserError(
                f"the one in {source} does not know {token}; give another folder", field="tokenizer"
            )
    if tokenizer.get_vocab_size() > rows:
        raise UserError(
            f"the one in {source} has {tokenizer.get_vocab_size()} tokens, the model's table {rows} rows; "
            "give another folder",
            field="tokenizer",
        )
    return LoadedTokenizer(tokenizer, source)


def write_llava(
    folder: Path, config: LlavaConfig, dtype: torch.dtype, tokenizer: LoadedTokenizer, originals: Path | None
) -> None:
    """Writes everything but weights and card of a transformers LLaVA folder.

    originals: a released folder, whose own files are kept for the way back.
    """
    config.architectures = ["LlavaForConditionalGeneration"]
    write_config(folder, config, dtype)
    write_generation(folder, config.text_config)
    write_processor(folder, config)
    _write_tokenizer(folder, tokenizer, PAD, config.text_config.max_position_embeddings)
    _keep_originals(originals, folder / ORIGINALS)


def write_processor(folder: Path, config: LlavaConfig) -> None:
    """Writes what makes images and chats the input of a LLaVA model."""
    vision = config.vision_config
    write_json(
        folder / "preprocessor_config.json",
        {"image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor"}
        | _clip_processor(vision.image_size, config.image_protocol),
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,  # the class token, which "default" takes away again
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        },
    )
    shutil.copyfile(_CHAT_TEMPLATE, folder / "chat_template.jinja")


def write_captioner(
    folder: Path,
    config: ShareCaptionerConfig,
    dtype: torch.dtype,
    tokenizer: LoadedTokenizer,
    originals: Path,
) -> None:
    """Writes everything but weights and card of a Share-Captioner folder."""
    config.architectures = ["ShareCaptioner"]
    write_config(folder, config, dtype)
    write_generation(folder, config.text_config)
    _write_tokenizer(folder, tokenizer, "</s>", config.text_config.max_position_embeddings)
    _keep_originals(originals, folder / ORIGINALS)


def released_config(source: Path, config: LlavaConfig, dtype: torch.dtype) -> dict[str, Any] | None:
    """Returns the released config.json of a transformers folder; None if the one kept with it still holds.

    Raises UserError when that one is broken.
    """
    came = source / ORIGINALS / "config.json"
    ours = _released_config(config, dtype)
    if not came.exists():
        return ours
    theirs = read_json(came)
    with config_errors(came):
        return None if still_describes(theirs, config, dtype) else theirs | ours


def released_tokenizer(source: Path) -> Path:
    """Returns the folder of the tokenizer for the way back: the kept original, else the folder itself."""
    came = source / ORIGINALS
    return came if any((came / name).exists() for name in _TOKENIZERS) else source


def write_released(
    folder: Path,
    source: Path,
    config: LlavaConfig,
    dtype: torch.dtype,
    tokenizer: LoadedTokenizer,
    changed: Mapping[str, Any] | None,
) -> None:
    """Writes the released layout's other files: the originals kept in `source`, as far as they still hold.

    changed: what `released_config` returned.
    """
    came = source / ORIGINALS
    _keep_originals(came, folder)
    if changed is not None:
        write_json(folder / "config.json", changed)
    if tokenizer.source != came:
        _copy_tokenizer(tokenizer.source, folder)
    tower = folder / "vision_tower"
    config.vision_config.architectures = ["CLIPVisionModel"]
    write_config(tower, config.vision_config, dtype)
    processor = _clip_processor(config.vision_config.image_size, "crop")
    write_json(tower / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"} | processor)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies tokenizer.model, which LLaVA's code reads, or tokenizer.json if the model never had one."""
    for name in _TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    kind = next(name for name in _TOKENIZERS if (source / name).exists())
    shutil.copyfile(source / kind, folder / kind)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": _TOKENIZERS[kind], **_SPECIAL})


def write_card(folder: Path, title: str, lines: list[str], usage: str = "") -> None:
    """Writes README.md. lines: one fact each. usage: Python that runs the model."""
    facts = "\n".join(f"- {line}" for line in lines)
    card = (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n"
        f"# {title}\nConverted by `sharegpt4v convert`; the terms of the source apply.\n\n{facts}\n"
    )
    if usage:
        card += f"\n```python\n{usage}```\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Writes config.json for this and for older versions of transformers; the weights are of `dtype`."""
    config.dtype = dtype
    content = json.loads(config.to_json_string())
    for part in content.values():
        if isinstance(part, dict):
            # What training was in. transformers 4 would load this part of the weights in it.
            part.pop("dtype", None)
    # What transformers before 4.56 reads in place of `dtype`, and before 5 in place of `rope_parameters`.
    content["torch_dtype"] = content["dtype"]
    rope = content.get("text_config", {}).get("rope_parameters")
    if rope:
        content["text_config"]["rope_theta"] = rope["rope_theta"]
    write_json(folder / "config.json", content)


def write_generation(folder: Path, text: LlamaConfig) -> None:
    """Writes greedy generation settings; `eos_token_id` may be several."""
    tokens = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**tokens, "do_sample": False})


def _write_tokenizer(folder: Path, tokenizer: LoadedTokenizer, pad: str, length: int) -> None:
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    if (tokenizer.source / "tokenizer.model").exists():
        shutil.copyfile(tokenizer.source / "tokenizer.model", folder / "tokenizer.model")
    content = {
        # Takes tokenizer.json as it is; LlamaTokenizer of version 5 would rebuild it another way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_SPECIAL,
        "pad_token": pad,
        "padding_side": "left",
        # transformers 4 adds token_type_ids without this, and its generate refuses them.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", content)


def _clip_processor(side: int, protocol: ImageProtocol) -> dict[str, Any]:
    """Returns the steps of a CLIP processor that make a square of an image as the protocol does."""
    square = {"height": side, "width": side}
    return {
        "do_convert_rgb": True,
        "do_pad": protocol == "pad",  # to a square with the mean colour
        "do_resize": True,
        "size": square if protocol == "squash" else {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": protocol != "squash",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _keep_originals(source: Path | None, folder: Path) -> None:
    if source is None or not source.is_dir():
        return
    folder.mkdir(exist_ok=True)
    for name in _ORIGINAL_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _released_config(config: LlavaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keys that LLaVA-1.5's code reads."""
    text = config.text_config
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "bos_token_id",
        "eos_token_id",
    )
    strategy = config.vision_feature_select_strategy
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{key: getattr(text, key) for key in kept},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind} | rope,
        "vocab_size": config.image_token_index,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "image_aspect_ratio": "pad" if config.image_protocol == "pad" else "square",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch" if strategy == "default" else "cls_patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": "vision_tower",
        "use_mm_proj": True,
    }


def read_llava_config(folder: Path) -> LlavaConfig:
    """Reads config.json of a transformers LLaVA folder. Raises UserError for another family."""
    content = read_json(folder / "config.json")
    check_transformers(folder / "config.json", content)
    with config_errors(folder / "config.json"):
        config = LlavaConfig.from_dict(content)
    if config.text_config.pad_token_id is None:
        config.text_config.pad_token_id = content.get("pad_token_id") or config.image_token_index + 1
    if not hasattr(config, "image_protocol"):
        config.image_protocol = "pad"  # as the LLaVA-1.5 models on the hub were trained
    return config
