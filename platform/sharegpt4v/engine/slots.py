"""The static key-value cache: a fixed number of slots, each with room for one dialogue.

Memory is taken once and never grows. A decode step writes one position in every slot and attends over the
longest live one only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from sharegpt4v.errors import UserError

_SHARE_OF_FREE_MEMORY = 0.9
"""What slots may take of it; prefill needs room for its activations, too."""


def bytes_per_slot(config: LlamaConfig, context: int, dtype: torch.dtype) -> int:
    """Keys and values of one dialogue of `context` tokens in all layers."""
    return (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * _head_dim(config)
        * context
        * dtype.itemsize
    )


def slots_that_fit(wanted: int, slot_bytes: int, free_bytes: int) -> int:
    """The number of slots to open: what is wanted, or what memory allows.

    Raises UserError, with both numbers, when not even one fits.
    """
    fitting = int(free_bytes * _SHARE_OF_FREE_MEMORY) // max(1, slot_bytes)
    if fitting < 1:
        raise UserError(
            f"one slot of the engine needs {slot_bytes / 1e9:.2f} GB of memory and {free_bytes / 1e9:.2f} GB "
            f"are free: give a smaller max_context, or a device with more memory"
        )
    return min(wanted, fitting)


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: on the card, or on this machine (MemAvailable)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


class SlotCache:
    """Keys and values of every layer, (slots, heads, context, head width) each."""

    def __init__(
        self, config: LlamaConfig, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, config.num_key_value_heads, context, _head_dim(config))
        layers = range(config.num_hidden_layers)
        self._device = device
        # Zeros, not what lay there: a masked position is multiplied by 0, and 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def fill(self, slots: list[int], prompts: DynamicCache) -> None:
        """Takes over prefilled prompts: row i of `prompts`, right-padded, goes into slots[i]."""
        index = torch.tensor(slots, device=self._device)
        for keys, values, layer in zip(self.keys, self.values, prompts.layers, strict=True):
            length = layer.keys.shape[2]
            keys[index, :, :length] = layer.keys
            values[index, :, :length] = layer.values

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot into another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def step(self, positions: Tensor, live: int) -> "SlotStep":
        """One decode step of the first len(positions) slots, attending over `live` positions at most."""
        return SlotStep(self, positions, live)


@dataclass(frozen=True, slots=True)
class SlotStep:
    """What Llama's layers take for their cache during one step.

    positions: (slots,) int64, where each slot's token stands. live: largest position + 1.
    """

    cache: SlotCache
    positions: Tensor
    live: int

    def mask(self) -> Tensor:
        """(slots, 1, 1, live) bool: a slot sees itself and what stands before it."""
        return (torch.arange(self.live, device=self.positions.device) <= self.positions[:, None])[
            :, None, None
        ]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """keys, values: (slots, heads, 1, width) of the new tokens. Returns all that is live."""
        rows = torch.arange(len(self.positions), device=self.positions.device)
        every, other = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        every[rows, :, self.positions] = keys[:, :, 0]
        other[rows, :, self.positions] = values[:, :, 0]
        count = len(self.positions)
        return every[:count, :, : self.live], other[:count, :, : self.live]


def _head_dim(config: LlamaConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads
