"""Whether the slots of a cache can be read each up to its own length: that takes a kernel of our own.

PyTorch's attention reads all slots up to the longest, behind one mask. That is the way on a CPU, and on a GPU
where the kernel cannot be used.
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
"""`triton_attention.attend_live`: query, keys, values, positions -> what each slot attends to."""

_TRIAL_POSITIONS = 70
"""Two blocks of what the kernel reads at once, and a part of a third."""


def load_attend_live(cache: SlotCache, heads: int) -> AttendLive | None:
    """The kernel, after it gave on this card what PyTorch gives; None, with the reason in the log, otherwise.

    cache: on a GPU and empty; its first slot is used and cleared. heads: of queries.
    """
    try:
        from sharegpt4v.engine.triton_attention import attend_live

        with torch.cuda.device(cache.keys[0].device):  # Triton launches on the current one
            check_against_mask(attend_live, cache, heads)
    except Exception as error:
        if concerns_all(error):
            raise
        # No Triton, no C compiler or headers of Python for it, a card or a width of heads it is not made for.
        log.warning(
            "attention reads every slot up to the longest one: the kernel that reads each up to its own "
            "length cannot be used here (%s)",
            one_line(error)[:300],
        )
        log.debug("why the kernel cannot be used", exc_info=True)
        return None
    return attend_live


def check_against_mask(attend_live: AttendLive, cache: SlotCache, heads: int) -> None:
    """Raises AssertionError if it differs from attention behind a mask by more than bfloat16 explains."""
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
