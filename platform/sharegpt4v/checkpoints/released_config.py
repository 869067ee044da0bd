"""The released config.json: sizes of a language model of either family, and how images enter LLaVA."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlavaConfig

from sharegpt4v.checkpoints.reader import Checkpoint
from sharegpt4v.errors import UserError

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_EPSILON = "rms_norm_eps"
_KEPT = (
    *_SIZES,
    _EPSILON,
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
)

_IMAGE_KEYS: Mapping[str, Mapping[Any, str]] = {
    "image_aspect_ratio": {"pad": "pad", "square": "crop", None: "crop"},
    "mm_vision_select_feature": {"patch": "default", "cls_patch": "full", None: "default"},
    "mm_projector_type": {"mlp2x_gelu": "", None: ""},
    "mm_use_im_start_end": {False: "", None: ""},
}
"""What released keys may say, and what that is for transformers."""


def read_released(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads config.json of a released folder.

    Raises UserError when it lacks a number that changes what the language model computes, or has none there.
    """
    path, released = checkpoint.folder / "config.json", checkpoint.config()
    for key in (*_SIZES, _EPSILON):
        if key not in released:
            raise UserError(f"{path} has no {key}; copy the released one")
    for key in _SIZES:
        if type(released[key]) is not int or released[key] < 1:
            raise UserError(f"{path}: {key} is {released[key]!r}, a whole number from 1 on is expected")
    rope = released.get("rope_theta")
    for key, value in ((_EPSILON, released[_EPSILON]), ("rope_theta", 10_000 if rope is None else rope)):
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{path}: {key} is {value!r}, a number above 0 is expected")
    return released


def text_config(released: Mapping[str, Any], vocabulary: int, **more: Any) -> LlamaConfig:
    """Returns the language model of a released config.json, with a table of `vocabulary` rows."""
    kept = {key: released[key] for key in _KEPT if released.get(key) is not None}
    return LlamaConfig.from_dict(kept | {"vocab_size": vocabulary} | more)


def image_fields(released: Mapping[str, Any]) -> dict[str, Any]:
    """Returns LlavaConfig's image fields. Raises UserError for a value that is none of LLaVA-1.5's."""
    said = {}
    for key, meanings in _IMAGE_KEYS.items():
        if released.get(key) not in meanings:
            known = ", ".join(str(value) for value in meanings if value is not None)
            raise UserError(
                f"{key} is {released[key]!r} in config.json; LLaVA-1.5 and ShareGPT4V have {known}"
            )
        said[key] = meanings[released.get(key)]
    return {
        "vision_feature_layer": released.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": said["mm_vision_select_feature"],
        "image_protocol": said["image_aspect_ratio"],
    }


def still_describes(released: Mapping[str, Any], config: LlavaConfig, dtype: torch.dtype) -> bool:
    """Returns whether a released config.json agrees with `config`, which training may have changed since."""
    text = config.text_config
    theirs = text_config(released, text.vocab_size)
    keys = {*_KEPT, "rope_parameters"} - {"rope_theta", "rope_scaling"}
    try:
        images = image_fields(released)
    except UserError:
        return False
    kind = str(dtype).removeprefix("torch.")
    return (
        released.get("vocab_size") == config.image_token_index
        and released.get("torch_dtype", kind) == kind
        and all(getattr(theirs, key) == getattr(text, key) for key in keys)
        and all(getattr(config, key) == value for key, value in images.items())
    )


@contextmanager
def config_errors(path: Path) -> Iterator[None]:
    """Turns an error of transformers about a config.json's values into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} describes no model: {reason}; correct it, or copy it again") from error
