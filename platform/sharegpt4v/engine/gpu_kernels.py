"""Chooses the kernels of a GPU: ours where their results are PyTorch's, PyTorch's own elsewhere.

In a decode step our attention reads each slot up to its own length only; PyTorch's reads all slots up to the
longest, under one mask.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from sharegpt4v.engine.failures import concerns_all
from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.llama import Kernels, Places, TorchKernels
from sharegpt4v.engine.slots import SlotCache, live_mask, to_stored

log = logging.getLogger(__name__)

AttendLive = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`triton_attention.attend_live`: query, keys, values, positions -> each slot's attention output."""

_TRIAL_POSITIONS = 70
"""Two of the blocks that the kernel reads at once, and a part of a third."""


def load_attend_live(cache: SlotCache, heads: int, dtype: torch.dtype) -> AttendLive | None:
    """Returns the kernel if its result on this GPU is PyTorch's; otherwise logs the reason and returns None.

    cache: on a GPU and empty; its first slot is used and cleared. heads: number of query heads. dtype: the
    model's.
    """
    try:
        from sharegpt4v.engine.triton_attention import attend_live

        with torch.cuda.device(cache.keys[0].device):  # Triton launches on the current device
            check_against_mask(attend_live, cache, heads, dtype)
    except Exception as error:
        _warn(
            error,
            "attention reads every slot up to the longest: the kernel that reads each up to its own length",
        )
        return None
    return attend_live


def load_kernels(cache: SlotCache, heads: int, dtype: torch.dtype) -> Kernels:
    """Returns the fused kernels if their results on this GPU are PyTorch's, otherwise PyTorch's and logs why.

    cache: on a GPU and empty; its first slot is used and cleared. heads: number of query heads. dtype: the
    model's.
    """
    try:
        from sharegpt4v.engine.triton_llama import TritonKernels

        with torch.cuda.device(cache.keys[0].device):
            check_kernels(TritonKernels(), cache, heads, dtype)
    except Exception as error:
        _warn(error, "norms, rotary positions and gates take several kernels each: the fused ones")
        return TorchKernels()
    return TritonKernels()


def _warn(error: Exception, what: str) -> None:
    """Logs why a kernel is not used. Raises the error if no kernel is at fault for it."""
    if concerns_all(error):
        raise error
    # No Triton, no C compiler or Python headers for it, or a GPU or head width that it does not support.
    log.warning("%s cannot be used here (%s)", what, one_line(error)[:300])
    log.debug("why the kernel cannot be used", exc_info=error)


def check_against_mask(attend_live: AttendLive, cache: SlotCache, heads: int, dtype: torch.dtype) -> None:
    """Raises AssertionError if it differs from masked attention by more than bfloat16's rounding explains."""
    keys, values = cache.keys[0], cache.values[0]
    random = torch.Generator(keys.device).manual_seed(0)
    live = min(_TRIAL_POSITIONS, keys.shape[2])
    kept, width = keys.shape[1], keys.shape[3]

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device).normal_(generator=random)

    for tensor in (keys, values):
        tensor[0, :, :live] = to_stored(draw(kept, live, width), tensor.dtype)
    query = draw(1, heads, 1, width)
    position = torch.tensor([live - 1], device=keys.device)
    found = attend_live(query, keys, values, position)
    expected = cache.attend(0, query, live_mask(position, live, dtype))
    cache.clear(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def check_kernels(kernels: Kernels, cache: SlotCache, heads: int, dtype: torch.dtype) -> None:
    """Raises AssertionError if a kernel differs from PyTorch's by more than bfloat16's rounding explains."""
    keys, values = cache.keys[0], cache.values[0]
    random = torch.Generator(keys.device).manual_seed(0)
    width, kept = keys.shape[3], keys.shape[1]
    # Slot and cell of each of three tokens; the last has the largest offsets.
    written = [(0, 1), (0, 0), (len(keys) - 1, keys.shape[2] - 1)]
    slots, cells = torch.tensor(written, device=keys.device).T.contiguous()
    places = Places(cells, slots, cells)

    def draw(*shape: int) -> Tensor:
        return torch.empty(3, *shape, dtype=dtype, device=keys.device).normal_(generator=random)

    angles = draw(width).float()
    qkv, hidden, delta, norm = draw((heads + 2 * kept) * width), draw(96), draw(96), draw(96)[0]
    results: list[list[Tensor]] = []
    for each in (TorchKernels(), kernels):
        found = [*each.add_norm(hidden.clone(), delta, norm, 1e-5), each.gate(hidden)]
        found += each.rotate_store(qkv.clone(), angles.cos(), angles.sin(), places, keys, values)
        for part in (keys, values):
            found += [part[slot, :, cell].to(dtype, copy=True) for slot, cell in written]
            for slot, cell in written:
                part[slot, :, cell].zero_()
        results.append(found)
    # One step of fp8 is up to an eighth of a number.
    tolerance = 0.13 if keys.itemsize == 1 else 0.06
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
