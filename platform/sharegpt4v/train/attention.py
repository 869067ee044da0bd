"""Causal attention within the segments of a packed row, registered at transformers' attention interface.

A packed row holds several dialogues one after another; a dialogue must not attend to its neighbours. On CUDA
torch's varlen kernel does that at half precision. Elsewhere segments of like length are gathered into a batch
for causal sdpa: padding is on the right, where causal attention never looks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "packed_segments"
"""Name of this attention in transformers' configuration of a language model."""

_LIKE = 0.8
"""Shortest segment of a group over its longest one: at most a fifth of a group is padding."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the dialogues of a packed row begin and end.

    starts: (S + 1,) int32, cumulative tokens. longest: tokens. groups: for each group of like segments the
    positions (n, L) int64 of its tokens, and which of them are no padding (n, L) bool. back: (T,)
    int64, where each token of the row is among the groups' tokens, one after another.
    """

    starts: Tensor
    longest: int
    groups: tuple[tuple[Tensor, Tensor], ...]
    back: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Makes the segments of a row from the tokens of each dialogue."""
        ends = torch.tensor(lengths).cumsum(0)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends])
        groups, order = [], []
        for members in _like(lengths):
            width = lengths[members[0]]
            steps = torch.arange(width)[None]
            real = steps < torch.tensor([lengths[i] for i in members])[:, None]
            positions = starts[torch.tensor(members)][:, None] + steps
            order.append(positions[real])
            groups.append((positions.where(real, torch.zeros(())).long().to(device), real.to(device)))
        back = torch.empty(int(ends[-1]), dtype=torch.long)
        back[torch.cat(order)] = torch.arange(len(back))
        return cls(starts.int().to(device), max(lengths), tuple(groups), back.to(device))


def _like(lengths: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for segment in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[segment] >= _LIKE * lengths[groups[-1][0]]:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within segments: query (1, H, T, D), key and value (1, H', T, D) -> (1, T, H, D).

    attention_mask: none, as the segments say everything. dropout: 0, as in all of our models.
    """
    assert query.shape[0] == 1 and attention_mask is None and not dropout
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(queries, keys, values, segments, scaling), None
    return _grouped(queries, keys, values, segments, scaling)[None], None


def _grouped(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Attends group by group: (T, H, D) -> (T, H, D)."""
    done = []
    for positions, real in segments.groups:
        queries, keys, values = (x[positions].transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        done.append(out.transpose(1, 2)[real])
    return torch.cat(done)[segments.back]


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # no CPU build needs it

    # PyTorch 2.11 does not know the word; models of ours have as many heads of keys as of queries.
    grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        segments.starts,
        segments.starts,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Makes no mask, which transformers would build for one dialogue of the whole row."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
