"""The operations between a Llama layer's matrices as three GPU kernels, in place of some thirty of PyTorch's.

Importing this needs Triton, which comes with PyTorch's CUDA builds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharegpt4v.engine.llama import Heads, Places, split_heads

_COLUMNS = 1024
"""Columns of the gate that a program computes."""


class TritonKernels:
    """`llama.Kernels` on a GPU. Computes in float32 and rounds once."""

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Adds in place."""
        rows, width = hidden.shape
        normed = torch.empty_like(hidden)
        block = triton.next_power_of_2(width)
        _add_norm[(rows,)](
            hidden,
            hidden if delta is None else delta,
            norm,
            normed,
            width,
            eps,
            ADDS=delta is not None,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )
        return hidden, normed

    def rotate_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, places: Places, keys: Tensor, values: Tensor
    ) -> Heads:
        """Rotates in place: the heads are views of qkv."""
        _, kept, context, width = keys.shape
        heads = split_heads(qkv, kept, width)
        asking = heads.query.shape[1]
        _rotate_store[(len(qkv), 3)](
            qkv,
            cos,
            sin,
            places.slots,
            places.cells,
            keys,
            values,
            context,
            ASKING=asking,
            KEPT=kept,
            ROWS=triton.next_power_of_2(asking),
            HALF=width // 2,
            HALF_BLOCK=triton.next_power_of_2(width // 2),
            num_warps=4,
        )
        return heads

    def gate(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        gated = gate_up.new_empty(rows, width)
        _gate[(rows, triton.cdiv(width, _COLUMNS))](gate_up, gated, width, BLOCK=_COLUMNS)
        return gated


@triton.jit
def _add_norm(hidden, delta, norm, normed, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """Computes one row per program."""
    row = tl.program_id(0).to(tl.int64) * width
    across = tl.arange(0, BLOCK)
    inside = across < width
    value = tl.load(hidden + row + across, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = value + tl.load(delta + row + across, mask=inside, other=0.0).to(tl.float32)
        stored = added.to(hidden.dtype.element_ty)
        tl.store(hidden + row + across, stored, mask=inside)
        value = stored.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    weight = tl.load(norm + across, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + across, (value * scale * weight).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_store(
    qkv,
    cos,
    sin,
    slots,
    cells,
    keys,
    values,
    context,
    ASKING: tl.constexpr,  # query heads
    KEPT: tl.constexpr,  # key heads
    ROWS: tl.constexpr,  # a power of two, ASKING at least
    HALF: tl.constexpr,  # half a head's width
    HALF_BLOCK: tl.constexpr,
):
    """Computes the queries, the keys or the values of one token per program, half a head beside the other."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, across = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
    width = 2 * HALF
    first = tl.where(part == 0, 0, tl.where(part == 1, ASKING, ASKING + KEPT))
    count = tl.where(part == 0, ASKING, KEPT)
    inside = (head < count) & (across < HALF)
    left = qkv + (token * (ASKING + 2 * KEPT) + first + head) * width + across
    a = tl.load(left, mask=inside, other=0.0)
    b = tl.load(left + HALF, mask=inside, other=0.0)
    if part < 2:
        angle = token * width + across
        beside = across < HALF
        cos_a = tl.load(cos + angle, mask=beside, other=0.0)
        cos_b = tl.load(cos + angle + HALF, mask=beside, other=0.0)
        sin_a = tl.load(sin + angle, mask=beside, other=0.0)
        sin_b = tl.load(sin + angle + HALF, mask=beside, other=0.0)
        one, other = a.to(tl.float32), b.to(tl.float32)
        a = (one * cos_a - other * sin_a).to(qkv.dtype.element_ty)
        b = (other * cos_b + one * sin_b).to(qkv.dtype.element_ty)
        tl.store(left, a, mask=inside)
        tl.store(left + HALF, b, mask=inside)
    if part > 0:
        if keys.dtype.element_ty == tl.float8e4nv:  # which has no infinity
            kept_a = tl.clamp(a.to(tl.float32), -448.0, 448.0)
            kept_b = tl.clamp(b.to(tl.float32), -448.0, 448.0)
        else:
            kept_a, kept_b = a, b
        slot, cell = tl.load(slots + token), tl.load(cells + token)
        place = ((slot * KEPT + head) * context + cell) * width + across
        if part == 1:
            tl.store(keys + place, kept_a.to(keys.dtype.element_ty), mask=inside)
            tl.store(keys + place + HALF, kept_b.to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(values + place, kept_a.to(values.dtype.element_ty), mask=inside)
            tl.store(values + place + HALF, kept_b.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate_up, gated, width, BLOCK: tl.constexpr):
    """Computes BLOCK columns of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    across = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = across < width
    gate = tl.load(gate_up + 2 * row * width + across, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + across, mask=inside, other=0.0).to(tl.float32)
    opened = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(gated + row * width + across, opened.to(gated.dtype.element_ty), mask=inside)
