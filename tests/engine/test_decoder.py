"""What the engine does on a device, looked at without a GPU.

Tensors of the meta device have no values: what makes the host wait for the device needs one and raises here.
A captured step may not do that, and nothing else should. Arithmetic with a tensor that was left on the CPU
raises, too.
"""

from itertools import islice, pairwise

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu_caption import MODELS, make_requests
from sharegpt4v.dialogue import SamplingParams
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.llama import Llama
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.errors import UserError
from sharegpt4v.models.lmm import share_gpt4v_config
from sharegpt4v.models.toy import toy_lmm_config

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """ShareGPT4V-7B's language model in bfloat16, with 64 slots."""
    with META:
        model = LlamaForCausalLM(share_gpt4v_config("7b").text_config).to(torch.bfloat16).eval()
    sampler = TokenSampler(64, 32_064, [2], META)
    return Decoder(Llama(model), sampler, slots=64, context=1_024, dtype=torch.bfloat16, device=META)


@torch.inference_mode()
def test_a_step_needs_no_value_from_the_device(decoder: Decoder) -> None:
    decoder.begin(range(48), torch.zeros(2, 48, dtype=torch.long, device=META), range(600, 648))
    picks = decoder.step({slot: 600 + slot for slot in range(48)})
    assert (picks.shape, picks.dtype, picks.device) == ((2, 48), torch.long, META)
    assert (decoder.logits.shape, decoder.logits.dtype) == ((48, 32_064), torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(576, 640, 610), (576, 576)])
def test_a_prefill_needs_no_value_from_the_device(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    prompts = [torch.empty(length, 4_096, dtype=torch.bfloat16, device=META) for length in lengths]
    spans = [Span(slot, 0, length) for slot, length in zip((7, 0, 33), lengths, strict=False)]
    logits = decoder.prefill(list(zip(spans, prompts, strict=True)))
    assert logits.shape == (len(lengths), 32_064)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("family", ["lmm", "resampler", "qformer"])
def test_embedding_needs_no_value_from_the_device(family: str) -> None:
    with META:
        adapter = MODELS[family](True, None)
    requests = list(islice(make_requests(adapter.image_size), 3))
    prompts = adapter.embed(requests)
    assert [prompt.device for prompt in prompts] == [META] * 3
    assert {len(prompt) for prompt in prompts} == {adapter.prompt_tokens(requests[0].turns)}


@torch.inference_mode()
def test_choosing_tokens_needs_no_value_from_the_device() -> None:
    """With penalties, early ends and draws of all slots."""
    sampler = TokenSampler(8, 32_000, [2], META)
    drawn = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
    penalised = SamplingParams(repetition_penalty=1.5, min_new_tokens=20)
    for slot, params in enumerate((drawn, penalised, SamplingParams())):
        sampler.admit(slot, params, seed=slot)
    sampler.move(2, 4)
    picks = sampler.choose(torch.empty(3, 32_000, device=META), [0, 1, 4])
    assert (picks.shape, picks.dtype, picks.device) == ((2, 3), torch.long, META)


@torch.inference_mode()
def test_a_prompt_in_parts_has_the_logits_of_the_whole() -> None:
    torch.manual_seed(0)
    config = toy_lmm_config().text_config
    model = LlamaForCausalLM(config).eval()
    lengths = [70, 5, 33]
    prompts = [torch.randn(length, config.hidden_size) for length in lengths]
    expected = torch.cat([model(inputs_embeds=prompt[None]).logits[:, -1] for prompt in prompts])
    for cuts in ([], [20], [1, 2, 60]):
        decoder = Decoder(
            Llama(model), TokenSampler(4, config.vocab_size, [2], CPU), 4, 128, torch.float32, CPU
        )
        for start, end in pairwise([0, *cuts, 70]):
            spans = [Span(2, start, end), Span(0, 0, 5), Span(3, 0, 33)]
            parts = [prompts[0][start:end], *prompts[1:]]
            found = decoder.prefill(list(zip(spans, parts, strict=True)))
        torch.testing.assert_close(found, expected)
    alike = decoder.prefill([(Span(slot, 0, 33), prompts[2]) for slot in (1, 3)])
    torch.testing.assert_close(alike, expected[[2, 2]])


@torch.inference_mode()
def test_a_step_and_a_prefill_in_one_pass_are_both() -> None:
    torch.manual_seed(0)
    config = toy_lmm_config().text_config
    model = LlamaForCausalLM(config).eval()
    prompts = [torch.randn(length, config.hidden_size) for length in (70, 5, 33, 20)]
    drawn = SamplingParams(temperature=1.0, repetition_penalty=1.3)
    found = []
    for apart in (False, True):
        sampler = TokenSampler(6, config.vocab_size, [2], CPU)
        sampler.admit(3, drawn, seed=1)
        decoder = Decoder(Llama(model), sampler, 6, 128, torch.float32, CPU)
        assert decoder.joins
        decoder.prefill([(Span(1, 0, 70), prompts[0]), (Span(3, 0, 5), prompts[1])])
        decoder.begin([1, 3], torch.tensor([[7, 8], [1, 1]]), [70, 5])
        parts: list[torch.Tensor] = []
        for step, spans in enumerate(([Span(0, 0, 33), Span(4, 0, 9)], [Span(4, 9, 20)], [])):
            fresh = [(span, prompts[2 if span.slot == 0 else 3][span.start : span.end]) for span in spans]
            positions = {1: 70 + step, 3: 5 + step}
            if apart and fresh:
                behind = decoder.prefill(fresh)
                picks = decoder.step(positions)
            else:
                picks, behind = decoder.step_and_prefill(positions, fresh)
            parts += [picks[:, [1, 3]].clone(), decoder.logits[[1, 3]].clone(), *([behind] if fresh else [])]
        found.append(parts + [tensor[:, :, :70] for tensor in decoder.cache.keys])
    for joined, alone in zip(*found, strict=True):
        torch.testing.assert_close(joined, alone)


def test_weights_of_joined_projections_are_held_once_and_stay_in_the_model() -> None:
    config = toy_lmm_config().text_config
    model = LlamaForCausalLM(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Llama(model)
    layer = model.model.layers[0].self_attn
    assert (
        layer.q_proj.weight.untyped_storage().data_ptr() == layer.v_proj.weight.untyped_storage().data_ptr()
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_with_adapters_is_refused_by_name() -> None:
    class Lora(torch.nn.Linear):
        pass

    model = LlamaForCausalLM(toy_lmm_config().text_config)
    model.model.layers[0].self_attn.o_proj = Lora(4, 4)
    with pytest.raises(UserError, match="this model has Lora: merge its adapters"):
        Llama(model)
