"""Run by test_triton_attention.py with TRITON_INTERPRET=1: the kernel's own code, on CPU tensors.

A program of its own, since Triton decides at its import whether it interprets.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from sharegpt4v.engine.gpu_kernels import check_against_mask, check_kernels
from sharegpt4v.engine.llama import Kernels, Llama
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.slots import SlotCache
from sharegpt4v.engine.triton_attention import attend_live
from sharegpt4v.engine.triton_llama import TritonKernels
from sharegpt4v.models.toy import toy_lmm_config
from tests.engine.compiling import small_cache
from tests.engine.requests import SteppingDecoder

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
def check_step(kernels: Kernels) -> None:
    """Prefills and decode steps through the kernels have the logits of PyTorch's operations."""
    torch.manual_seed(0)
    config = toy_lmm_config().text_config
    lengths = [3, 90, 41]
    prompts = [torch.randn(length, config.hidden_size) for length in lengths]
    model = LlamaForCausalLM(config).eval()
    found = []
    for ours in (False, True):
        sampler = TokenSampler(4, config.vocab_size, [2], CPU)
        decoder = SteppingDecoder(Llama(model), sampler, 4, 128, torch.float32, CPU)
        if ours:
            decoder._attend_live, decoder._kernels = attend_live, kernels
        decoder.prepare()
        spans = [Span(slot, 0, length) for slot, length in enumerate(lengths)]
        logits = [decoder.prefill(list(zip(spans, prompts, strict=True)))]
        decoder.begin([0, 1, 2], torch.tensor([[5, 6, 7], [1, 1, 1]]), lengths)
        for step in range(3):
            picks = decoder.step({slot: length + step for slot, length in enumerate(lengths)})
            logits += [decoder.logits[:3].clone(), picks.clone()]
        found.append(logits)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for heads in (4, 2, 1):
            check_values(heads, 128, dtype)
    check_values(4, 16, torch.float32)
    check_that_slots_are_alone()
    kernels = TritonKernels()
    check_step(kernels)
    for heads, kept, width in ((4, 4, 32), (6, 2, 16), (3, 3, 24)):
        for dtype in (torch.float32, torch.bfloat16):
            check_kernels(kernels, small_cache(heads, kept, width, dtype), heads, dtype)
    config = toy_lmm_config().text_config
    for stored in (torch.bfloat16, torch.float8_e4m3fn):
        cache = SlotCache(config, 2, 128, stored, CPU)
        # Writes in fp8 are checked on a GPU alone: the interpreter of Triton 3.7.1 rounds 1.95 to 1.
        check_against_mask(attend_live, cache, config.num_attention_heads, torch.bfloat16)


if __name__ == "__main__":
    main()
