"""Attention of a decode step on a GPU: each slot reads only its own live positions.

Under one mask for all slots each of them reads up to the longest. Lengths of answers in progress differ by
hundreds of positions, and reading keys and values is most of a step.

Importing this needs Triton, which comes with PyTorch's CUDA builds.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_LAUNCH = {1: (32, 4, 2), 2: (32, 3, 4), 4: (16, 3, 4)}
"""By bytes of a number: positions that a program reads at once; such blocks in shared memory, all but one of
them still being copied; warps of a program. Measured on an H200 (benchmarks/README.md)."""

_LEAST = tl.constexpr(-1e30)
"""Replaces a score of minus infinity, whose difference from itself would be NaN."""


def attend_live(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Computes attention of one token per slot over positions 0 to its own, in float32 for any dtype.

    query: (n, heads, 1, width); keys, values: (slots, key heads, context, width), contiguous, n <= slots;
    positions: (n,) int64, below context. width: a power of two. Returns a tensor of query's shape and dtype.
    """
    slots, heads, _, width = query.shape
    if query.stride()[1:] != (width, width, 1):  # heads may stand beside those of keys and values
        query = query.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    # exp2 is one GPU instruction, exp is two.
    scale = math.log2(math.e) / math.sqrt(width)
    block, stages, warps = _LAUNCH[keys.itemsize]
    _attend[(slots, heads)](
        query,
        keys,
        values,
        positions,
        out,
        scale,
        keys.shape[2],
        query.stride(0),
        HEADS=heads,
        GROUP=heads // keys.shape[1],
        WIDTH=width,
        BLOCK=block,
        STAGES=stages,
        num_warps=warps,
        enable_fp_fusion=True,  # multiply and add in one, which Triton 3.10 leaves out unless asked
    )
    return out


@triton.jit
def _attend(
    query,
    keys,
    values,
    positions,
    out,
    scale,
    context,
    query_row,  # elements from one slot's query to the next
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share one head of keys
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes one slot and head per program. Each of BLOCK lanes has its own softmax over every BLOCK-th
    position, so that the loop reduces over the head width only; lanes are combined once, after it."""
    slot, head = tl.program_id(0), tl.program_id(1)
    live = tl.load(positions + slot).to(tl.int32) + 1
    across, lane = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    asked = tl.load(query + slot * query_row + head * WIDTH + across).to(tl.float32) * scale
    start = (slot * (HEADS // GROUP) + head // GROUP).to(tl.int64) * context * WIDTH
    own_keys, own_values = keys + start, values + start
    best = tl.full([BLOCK], _LEAST, tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in tl.range(0, live, BLOCK, num_stages=STAGES):
        position = first + lane
        # Beyond its end a slot reads its last position again: loads without a mask can be prefetched.
        cells = tl.minimum(position, live - 1)[:, None] * WIDTH + across[None, :]
        key, value = tl.load(own_keys + cells), tl.load(own_values + cells)
        score = tl.sum(key.to(tl.float32) * asked[None, :], 1)
        score = tl.where(position < live, score, _LEAST)
        top = tl.maximum(best, score)
        old, new = tl.exp2(best - top), tl.exp2(score - top)
        weights = weights * old + new
        mixed = mixed * old[:, None] + new[:, None] * value.to(tl.float32)
        best = top
    # A lane without a live position has _LEAST as its best, and so a share of 0.
    share = tl.exp2(best - tl.max(best, 0))
    answer = tl.sum(mixed * share[:, None], 0) / tl.sum(weights * share, 0)
    tl.store(out + (slot * HEADS + head) * WIDTH + across, answer.to(out.dtype.element_ty))
