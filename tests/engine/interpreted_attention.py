"""Run by test_triton_attention.py with TRITON_INTERPRET=1: the kernel's own code, on CPU tensors.

A program of its own, since Triton decides at its import whether it interprets.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.live_attention import check_against_mask
from sharegpt4v.engine.slots import SlotCache
from sharegpt4v.engine.triton_attention import attend_live
from sharegpt4v.models.toy import toy_lmm_config
from tests.engine.requests import repeat_steps

CPU = torch.device("cpu")
LIVE = (1, 251, 32, 33, 64, 300)


def tensors(heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, keys, values and positions; what stands behind a slot's position is NaN."""
    torch.manual_seed(0)
    query = torch.randn(1, 4, len(LIVE), width, dtype=dtype).transpose(0, 2)  # its heads are not in order
    keys, values = (torch.randn(len(LIVE) + 1, heads, 300, width, dtype=dtype) for _ in range(2))
    for slot, live in enumerate(LIVE):
        keys[slot, :, live:] = values[slot, :, live:] = torch.nan
    return query, keys, values, torch.tensor(LIVE) - 1


def check_values(heads: int, width: int, dtype: torch.dtype) -> None:
    query, keys, values, positions = tensors(heads, width, dtype)
    found = attend_live(query, keys, values, positions)
    assert (found.dtype, found.shape) == (dtype, query.shape)
    for slot, live in enumerate(LIVE):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[slot].double(),
            keys[slot, :, :live].double(),
            values[slot, :, :live].double(),
            enable_gqa=True,
        )
        torch.testing.assert_close(found[slot], expected.to(dtype))


def check_that_slots_are_alone() -> None:
    """Bit for bit what a slot has by itself, and a slot that is not a number leaves the others alone."""
    query, keys, values, positions = tensors(4, 64, torch.float32)
    together = attend_live(query, keys, values, positions)
    alone = attend_live(query[:2], keys, values, positions[:2])
    assert torch.equal(together[:2], alone)
    keys[1, :, 5] = torch.nan
    damaged = attend_live(query, keys, values, positions)
    assert damaged[1].isnan().all()
    assert torch.equal(damaged[2:], together[2:])


@torch.inference_mode()
def check_step() -> None:
    """A decode step that reads the cache through the kernel has the logits of one that uses the mask."""
    torch.manual_seed(0)
    config = toy_lmm_config().text_config
    decoder = Decoder(LlamaForCausalLM(config).eval(), 4, 128, torch.float32, CPU)
    lengths = [3, 90, 41]
    decoder.prefill([torch.randn(length, config.hidden_size) for length in lengths], [0, 1, 2])
    masked = decoder.step([5, 6, 7], lengths)
    decoder._attend_live = attend_live
    repeat_steps(decoder, 4, 128, by_length=False)
    torch.testing.assert_close(decoder.step([5, 6, 7], lengths), masked)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for heads in (4, 2, 1):
            check_values(heads, 128, dtype)
    check_values(4, 16, torch.float32)
    check_that_slots_are_alone()
    check_step()
    config = toy_lmm_config().text_config
    cache = SlotCache(config, 2, 128, torch.bfloat16, CPU)
    check_against_mask(attend_live, cache, config.num_attention_heads)


if __name__ == "__main__":
    main()
