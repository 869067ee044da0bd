"""Chooses the attention of decode steps on a GPU: our kernel reads each slot up to its own length only.

PyTorch's attention reads all slots up to the longest, under one mask. It is used on a CPU, and on a GPU where
the kernel cannot run.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from sharegpt4v.engine.failures import concerns_all
from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.slots import SlotCache, live_mask

log = logging.getLogger(__name__)

AttendLive = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`triton_attention.attend_live`: query, keys, values, positions -> each slot's attention output."""

_TRIAL_POSITIONS = 70
"""Two of the blocks that the kernel reads at once, and a part of a third."""


def load_attend_live(cache: SlotCache, heads: int) -> AttendLive | None:
    """Returns the kernel if its result on this GPU is PyTorch's; otherwise logs the reason and returns None.

    cache: on a GPU and empty; its first slot is used and cleared. heads: number of query heads.
    """
    try:
        from sharegpt4v.engine.triton_attention import attend_live

        with torch.cuda.device(cache.keys[0].device):  # Triton launches on the current device
            check_against_mask(attend_live, cache, heads)
    except Exception as error:
        if concerns_all(error):
            raise
        # No Triton, no C compiler or Python headers for it, or a GPU or head width that it does not support.
        log.warning(
            "attention reads every slot up to the longest one: the kernel that reads each up to its own "
            "length cannot be used here (%s)",
            one_line(error)[:300],
        )
        log.debug("why the kernel cannot be used", exc_info=True)
        return None
    return attend_live


def check_against_mask(attend_live: AttendLive, cache: SlotCache, heads: int) -> None:
    """Raises AssertionError if it differs from masked attention by more than bfloat16's rounding explains."""
    keys, values = cache.keys[0], cache.values[0]
    random = torch.Generator(keys.device).manual_seed(0)
    live = min(_TRIAL_POSITIONS, keys.shape[2])
    for tensor in (keys, values):
        tensor[0, :, :live].normal_(generator=random)
    query = keys.new_empty(1, heads, 1, keys.shape[-1]).normal_(generator=random)
    position = torch.tensor([live - 1], device=keys.device)
    found = attend_live(query, keys, values, position)
    expected = cache.attend(0, query, live_mask(position, live, keys.dtype))
    cache.clear(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
