"""What tests of compiled libraries share."""

import shutil
import sys

import pytest
import torch
from transformers import LlamaConfig

from sharegpt4v.engine.slots import SlotCache

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="there is no g++ here"
)


def small_cache(
    heads: int = 2, kept: int = 2, width: int = 32, dtype: torch.dtype = torch.float32, slots: int = 5
) -> SlotCache:
    config = LlamaConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=kept,
        num_hidden_layers=1,
        vocab_size=8,
    )
    return SlotCache(config, slots, 48, dtype, torch.device("cpu"))
