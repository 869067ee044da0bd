"""The released config.json: a language model's sizes, whichever family it is of."""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from sharegpt4v.errors import UserError
from sharegpt4v.models.convert.checkpoint import Checkpoint

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_KEPT = (
    *_NEEDED,
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
)


def read_released(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a released folder. Raises UserError when it lacks a size of the language model."""
    released = checkpoint.config()
    absent = [key for key in _NEEDED if key not in released]
    if absent:
        raise UserError(f"{checkpoint.folder / 'config.json'} has no {absent[0]}; copy the released one")
    return released


def text_config(released: Mapping[str, Any], vocabulary: int, **more: Any) -> LlamaConfig:
    """The language model of a released config.json, with a table of `vocabulary` rows."""
    kept = {key: released[key] for key in _KEPT if released.get(key) is not None}
    return LlamaConfig.from_dict(kept | {"vocab_size": vocabulary} | more)
