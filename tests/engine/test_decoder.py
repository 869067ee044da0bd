"""The decode step that CUDA graphs capture, looked at without a GPU.

Tensors of the meta device have no values: what makes the host wait for the device, which a captured step may
not do, needs a value and raises here. So does arithmetic with a tensor that was left on the CPU.
"""

import pytest
import torch
from transformers import LlamaForCausalLM

from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.models.lmm import share_gpt4v_config

META = torch.device("meta")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """ShareGPT4V-7B's language model in bfloat16, with 64 slots."""
    with META:
        model = LlamaForCausalLM(share_gpt4v_config("7b").text_config).to(torch.bfloat16).eval()
    return Decoder(model, slots=64, context=1_024, dtype=torch.bfloat16, device=META)


@torch.inference_mode()
def test_a_step_needs_no_value_from_the_device(decoder: Decoder) -> None:
    logits = decoder.step(tokens=[5] * 48, positions=list(range(600, 648)))
    assert logits.shape == (48, 32_064)
    assert logits.dtype == torch.float32
    assert logits.device == META


@torch.inference_mode()
def test_a_prefill_needs_no_value_from_the_device(decoder: Decoder) -> None:
    prompts = [torch.empty(length, 4_096, dtype=torch.bfloat16, device=META) for length in (576, 640, 610)]
    logits = decoder.prefill(prompts, slots=[7, 0, 33])
    assert logits.shape == (3, 32_064)
    assert logits.dtype == torch.float32
