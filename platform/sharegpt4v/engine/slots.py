"""The static key-value cache: a fixed number of slots, each large enough for one dialogue.

Memory is allocated once and never grows. A decode step writes one position in every slot and reads at most
up to the longest live one. Slots without a request write into their last cell, which no answer reaches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from sharegpt4v.engine.memory import free_memory
from sharegpt4v.errors import UserError

_SHARE_OF_FREE_MEMORY = 0.9
"""Share for the slots and one prefill; the vision tower and captured graphs need the rest."""

_BYTES_OF_A_CALL = 400_000
"""Bytes of padding that two cores read in the time of one more attention call, about 40 microseconds."""


def bytes_per_slot(config: PreTrainedConfig, context: int, dtype: torch.dtype) -> int:
    """Computes the bytes of keys and values in all layers for a dialogue of `context` tokens."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * head_width(config)
    return 2 * int(config.num_hidden_layers) * width * context * dtype.itemsize


def padded_context(context: int) -> int:
    """Adds the unused cell and rounds up: attention kernels read rows of 8, and copy other masks."""
    return -(-(context + 1) // 8) * 8


def slots_that_fit(wanted: int, slot_bytes: int, free_bytes: int, beside: int = 0) -> int:
    """Returns the number of slots to open: `wanted`, or fewer when memory holds fewer.

    beside: bytes needed besides the slots. Raises UserError, with both numbers, when not even one slot fits.
    """
    fitting = int(free_bytes * _SHARE_OF_FREE_MEMORY - beside) // max(1, slot_bytes)
    if fitting < 1:
        raise UserError(
            f"one slot of the engine needs {(slot_bytes + beside) / 1e9:.2f} GB of memory and "
            f"{free_bytes / 1e9:.2f} GB are free: lower `max_new_tokens`, or take a larger device"
        )
    return min(wanted, fitting)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes free to allocate: on the GPU, or on this machine within its control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def to_stored(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds keys or values to the dtype of the cache; fp8 has no infinity and is cut at its largest."""
    if dtype == torch.float8_e4m3fn:
        most = torch.finfo(dtype).max
        heads = heads.clamp(-most, most)
    return heads.to(dtype)


class SlotCache:
    """Keys and values of every layer, (slots, heads, context, head width) each, in bfloat16, say, or fp8."""

    def __init__(
        self, config: LlamaConfig, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, config.num_key_value_heads, context, head_width(config))
        layers = range(config.num_hidden_layers)
        self._device = device
        # Zeros, not uninitialised memory: a masked position is multiplied by 0, and 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def clear(self, slot: int) -> None:
        """Sets a slot to zeros."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot into another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def attend(self, layer: int, query: Tensor, mask: Tensor) -> Tensor:
        """Attends with query (slots, heads, 1, width), each over its own slot. mask: `live_mask`."""
        slots, live = len(query), mask.shape[-1]
        keys, values = self.keys[layer][:slots, :, :live], self.values[layer][:slots, :, :live]
        return _attention(query, keys, values, mask)

    def attend_each(self, layer: int, query: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attends with one call for each slot over exactly its own length, and so reads no padding."""
        keys, values = self.keys[layer], self.values[layer]
        return torch.cat(
            [
                _attention(
                    query[slot : slot + 1],
                    keys[slot : slot + 1, :, :length],
                    values[slot : slot + 1, :, :length],
                )
                for slot, length in enumerate(lengths)
            ]
        )

    def better_apart(self, lengths: Sequence[int]) -> bool:
        """Returns whether reading padding up to the longest slot takes longer than a call per slot (CPU)."""
        if self._device.type != "cpu" or not self.keys:
            return False
        _, heads, _, width = self.keys[0].shape
        padding = max(lengths) - sum(lengths) / len(lengths)
        return padding * 2 * heads * width * self.keys[0].itemsize > _BYTES_OF_A_CALL


def live_mask(positions: Tensor, live: int, dtype: torch.dtype) -> Tensor:
    """Returns an additive mask (slots, 1, 1, live): each slot attends to positions up to its own.

    0 and -inf in the query's dtype, shared by all layers: each layer would convert a bool mask to this.
    """
    hidden = torch.arange(live, device=positions.device) > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill(hidden, -torch.inf)[:, None, None]


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    grouped = query.shape[1] != keys.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys.to(query.dtype), values.to(query.dtype), attn_mask=mask, enable_gqa=grouped
    )


def head_width(config: PreTrainedConfig) -> int:
    """Returns the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
