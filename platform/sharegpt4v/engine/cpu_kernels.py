"""What surrounds the matrices of a Llama layer on a CPU, in C++: attention, norms, rotary positions, gates.

In a decode step PyTorch's attention reads all slots up to the longest one, or costs 40 microseconds a slot;
this one reads each slot to its own length, all in one call. cpu_kernels.cpp is compiled for this processor
and the model's heads, in some seconds, when an engine first starts. Without a compiler PyTorch's calls are
used.
"""

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from sharegpt4v.engine.cpu_library import call, load_library
from sharegpt4v.engine.gpu_kernels import AttendLive, check_against_mask, check_kernels
from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.llama import Heads, Kernels, Places, TorchKernels, split_heads
from sharegpt4v.engine.slots import SlotCache

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def load_attend_live(cache: SlotCache, heads: int, dtype: torch.dtype) -> AttendLive | None:
    """Returns the attention of a decode step, None where there is none for this machine or dtype.

    Nor where its result is not PyTorch's: the log then says so. cache: on a CPU and empty; its first slot is
    used and cleared. heads: number of query heads. dtype: the model's.
    """
    library = _library_for(cache, dtype)
    if library is None:
        return None
    function = getattr(library, f"attend_{_DTYPES[dtype]}")

    def attend_live(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Computes what `triton_attention.attend_live` does."""
        slots, heads, _, width = query.shape
        if query.stride()[1:] != (width, width, 1):  # heads may stand beside those of keys and values
            query = query.contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept, context = keys.shape[1:3]
        sizes = (slots, kept, heads // kept, context, query.stride(0))
        call(function, (query, keys, values, positions.contiguous(), out), sizes)
        return out

    try:
        check_against_mask(attend_live, cache, heads, dtype)
    except AssertionError as error:
        _warn(error)
        return None
    return attend_live


def load_kernels(cache: SlotCache, heads: int, dtype: torch.dtype) -> Kernels:
    """Returns the small operations of this module, PyTorch's where there are none for this machine or dtype.

    Also where their results are not PyTorch's: the log then says so. cache: on a CPU and empty; its first
    slot is used and cleared. heads: number of query heads. dtype: the model's.
    """
    library = _library_for(cache, dtype)
    if library is None:
        return TorchKernels()
    kernels = _CompiledKernels(library, dtype)
    try:
        check_kernels(kernels, cache, heads, dtype)
    except AssertionError as error:
        _warn(error)
        return TorchKernels()
    return kernels


def _warn(error: AssertionError) -> None:
    log.warning(
        "what the compiler here made of the kernels computes something else than PyTorch (%s): not used",
        one_line(error)[:300],
    )


class _CompiledKernels:
    """`llama.Kernels` on a CPU. Computes in float32 and rounds once."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        names = ("add_norm", "rotate_store", "gate")
        self._add_norm, self._rotate_store, self._gate = (
            getattr(library, f"{name}_{_DTYPES[dtype]}") for name in names
        )

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Adds in place."""
        hidden, delta = hidden.contiguous(), None if delta is None else delta.contiguous()
        normed = torch.empty_like(hidden)
        call(self._add_norm, (hidden, delta, norm.to(hidden), normed), hidden.shape, ctypes.c_float(eps))
        return hidden, normed

    def rotate_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, places: Places, keys: Tensor, values: Tensor
    ) -> Heads:
        """Rotates in place: the heads are views of qkv."""
        _, kept, context, width = keys.shape
        heads = split_heads(qkv, kept, width)
        asking = heads.query.shape[1]
        angles = (cos.contiguous(), sin.contiguous(), places.slots.contiguous(), places.cells.contiguous())
        call(self._rotate_store, (qkv, *angles, keys, values), (len(qkv), asking, kept, width, context))
        return heads

    def gate(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        gated = gate_up.new_empty(rows, width)
        call(self._gate, (gate_up.contiguous(), gated), (rows, width))
        return gated


def _library_for(cache: SlotCache, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Returns the kernels if they can be had and know this dtype, of the model and in the slots."""
    if not cache.keys or dtype not in _DTYPES or cache.keys[0].dtype != dtype:
        return None
    return load_library(_SOURCE, f"WIDTH={cache.keys[0].shape[3]}")
