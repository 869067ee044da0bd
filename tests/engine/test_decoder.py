"""What the engine does on a device, looked at without a GPU.

Tensors of the meta device have no values: what makes the host wait for the device needs one and raises here.
A captured step may not do that, and nothing else should. Arithmetic with a tensor that was left on the CPU
raises, too.
"""

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu_caption import MODELS, make_requests
from sharegpt4v.dialogue import SamplingParams
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.sampling import TokenSampler
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


@pytest.mark.parametrize("family", ["lmm", "resampler", "qformer"])
def test_embedding_needs_no_value_from_the_device(family: str) -> None:
    with META:
        adapter = MODELS[family](True, None)
    requests = make_requests(3, adapter.image_size)
    prompts = adapter.embed(requests)
    assert [prompt.device for prompt in prompts] == [META] * 3
    assert {len(prompt) for prompt in prompts} == {adapter.prompt_tokens(requests[0].turns)}


@torch.inference_mode()
def test_tokens_are_copied_from_the_device_once_in_a_step() -> None:
    """Behind penalties, early ends and draws of all slots; everything before that copy needs no value."""
    sampler = TokenSampler(8, [2], META)
    drawn = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
    penalised = SamplingParams(repetition_penalty=1.5, min_new_tokens=20)
    for slot, params in enumerate((drawn, penalised, SamplingParams())):
        sampler.admit(slot, params, seed=slot)
    sampler.move(2, 4)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta") as raised:
        sampler.pick(torch.empty(3, 32_000, device=META), [0, 1, 4])
    lines = [str(entry.statement) for entry in raised.traceback if "sampling.py" in str(entry.path)]
    assert lines[-1].strip() == "chosen, numeric = torch.stack([tokens, finite.long()]).tolist()"
