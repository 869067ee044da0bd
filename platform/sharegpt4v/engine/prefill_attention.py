"""Causal attention of a prefill: packed tokens of several dialogues, each over its own slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sharegpt4v.engine.llama import Heads
from sharegpt4v.engine.slots import SlotCache


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that a prefill adds to one slot: positions `start` to `end` - 1.

    stored: whether their keys and values are kept there; several spans may share what the slot held before.
    """

    slot: int
    start: int
    end: int
    stored: bool = True

    def __len__(self) -> int:
        return self.end - self.start


class PrefillAttention:
    """Attends for one prefill; `spans` lie one behind the other in the packed tokens."""

    def __init__(
        self, cache: SlotCache, spans: Sequence[Span], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._cache = cache
        self._spans = spans
        self._firsts = [0, *accumulate(len(span) for span in spans)]
        lengths = {len(span) for span in spans}
        fresh = not any(span.start for span in spans)
        self._equal = fresh and len(lengths) == 1 and len(spans) > 1
        self._packed = not self._equal and device.type == "cuda" and dtype != torch.float32
        if self._packed:
            self._most = max(lengths), max(span.end for span in spans)
            self._from_cache = not fresh
            counts = ([len(span) for span in spans], [span.end for span in spans], [1] * len(spans))
            bounds = torch.tensor([[0, *count] for count in counts], device=device).cumsum(1)
            self._new, self._all, self._single = bounds.to(torch.int32)

    def __call__(self, layer: int, heads: Heads, only_last: bool) -> Tensor:
        """Returns (queries, heads x width). only_last: there is one query a span, of its last token."""
        if self._equal:
            return self._together(heads, only_last)
        if self._packed:
            return self._in_one_call(layer, heads, only_last)
        return self._one_by_one(layer, heads, only_last)

    def _together(self, heads: Heads, only_last: bool) -> Tensor:
        """Attends in one batch: all spans are whole dialogues of one length."""
        query, keys, values = (
            part.reshape(len(self._spans), -1, *part.shape[1:]).transpose(1, 2) for part in heads
        )
        return _flat(_attend(query, keys, values, causal=not only_last))

    def _in_one_call(self, layer: int, heads: Heads, only_last: bool) -> Tensor:
        """Attends with the variable-length form of FlashAttention, which needs half precision and a GPU."""
        keys, values = heads.keys, heads.values
        if self._from_cache:
            pairs = [self._reached(layer, heads, number) for number in range(len(self._spans))]
            keys, values = (torch.cat(part) for part in zip(*pairs, strict=True))
        # The public torch.nn.attention.varlen has no form that both PyTorch 2.11 and 2.13 accept.
        attended: Tensor = torch.ops.aten._flash_attention_forward(
            heads.query,
            keys,
            values,
            self._single if only_last else self._new,
            self._all,
            1 if only_last else self._most[0],
            self._most[1],
            0.0,
            not only_last,
            False,
        )[0]
        return attended.flatten(1)

    def _one_by_one(self, layer: int, heads: Heads, only_last: bool) -> Tensor:
        parts = []
        for number in range(len(self._spans)):
            first, end = self._firsts[number : number + 2]
            query = heads.query[number : number + 1] if only_last else heads.query[first:end]
            keys, values = (part.transpose(0, 1)[None] for part in self._reached(layer, heads, number))
            attended = _attend(query.transpose(0, 1)[None], keys, values, causal=not only_last)
            parts.append(_flat(attended))
        return torch.cat(parts)

    def _reached(self, layer: int, heads: Heads, number: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values before a span and its own, (positions, key heads, width) each."""
        span, (first, end) = self._spans[number], self._firsts[number : number + 2]
        own = heads.keys[first:end], heads.values[first:end]
        if not span.start:
            return own
        stored = self._cache.keys[layer], self._cache.values[layer]
        keys, values = (
            torch.cat([part[span.slot, :, : span.start].transpose(0, 1).to(new.dtype), new])
            for part, new in zip(stored, own, strict=True)
        )
        return keys, values


def _attend(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """Attends with the last of the keys' positions; all (B, heads, positions, width)."""
    asked, there = query.shape[2], keys.shape[2]
    mask = None
    if causal and asked != there:
        reach = torch.arange(there - asked, there, device=query.device)[:, None]
        mask = torch.arange(there, device=query.device) <= reach
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _flat(attended: Tensor) -> Tensor:
    """Packs (B, heads, positions, width) to (B x positions, heads x width)."""
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)
