"""Released Share-Captioner, both layouts -> ours: same logits, LoRA merged, end tokens and words in place."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharegpt4v.checkpoints.captioner import merge
from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.dialogue import Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import CaptionerAdapter
from sharegpt4v.models.captioner import ImageSampler, sincos_positions
from sharegpt4v.models.load import load_adapter
from tests.checkpoints.released import (
    QUERIES,
    RESAMPLER_WIDTH,
    Tensors,
    captioner_tensors,
    save_captioner,
    save_safetensors,
)
from tests.models import by_hand

SHARD = 400_000  # bytes
PIXELS = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))
BEFORE, AFTER = [1, 9, 300], [12, 7, 5]
LAYOUTS: list[ImageSampler] = ["resampler", "qformer"]


def converted(tmp_path: Path, tensors: Tensors) -> CaptionerAdapter:
    model = save_captioner(tmp_path / "ShareCaptioner", tensors)
    convert(plan_conversion(model), tmp_path / "out", SHARD)
    adapter = load_adapter(tmp_path / "out")
    assert isinstance(adapter, CaptionerAdapter)
    return adapter


@torch.inference_mode()
def logits(adapter: CaptionerAdapter) -> Tensor:
    template = adapter.template
    ids = torch.tensor([[*BEFORE, *[template.image_token_id] * template.image_tokens, *AFTER]])
    output: Tensor = adapter.model(ids, PIXELS).logits[0]
    return output


@pytest.mark.parametrize(("sampler", "lora"), [("resampler", False), ("qformer", True), ("qformer", False)])
def test_converted_model_computes_what_the_released_tensors_do(
    sampler: ImageSampler, lora: bool, tmp_path: Path
) -> None:
    tensors = captioner_tensors(sampler, lora=lora)
    adapter = converted(tmp_path, tensors)
    assert adapter.model.config.sampler == sampler
    expected = by_hand.captioner_logits(tensors, BEFORE, AFTER, PIXELS)
    # Measured: 3e-6 at logits of up to 3.
    torch.testing.assert_close(logits(adapter), expected, atol=2e-5, rtol=0)


def test_bias_of_the_keys_is_zero(tmp_path: Path) -> None:
    # Attention does not change with it, so logits would not tell.
    tensors = captioner_tensors("resampler")
    layer = converted(tmp_path, tensors).model.vision_model.encoder.layers[1]
    query, value = (tensors[f"visual_encoder.blocks.1.attn.{name}_bias"] for name in "qv")
    assert torch.equal(layer.self_attn.qkv.bias, torch.cat([query, torch.zeros(176), value]))


def test_lora_that_is_left_out_would_be_noticed() -> None:
    tensors = captioner_tensors("qformer")
    without = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    difference = by_hand.captioner_logits(tensors, BEFORE, AFTER, PIXELS) - by_hand.captioner_logits(
        without, BEFORE, AFTER, PIXELS
    )
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_weight_equals_the_branch_beside_it(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    weight, down, up, x = (
        torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in ((1500, 40), (8, 40), (1500, 8), (5, 40))
    )
    weight, down, up = (t.to(dtype) for t in (weight, down, up))
    merged = merge(weight, down, up, scale=1.5)
    assert merged.dtype == dtype
    exact = x @ weight.double().T + 1.5 * ((x @ down.double().T) @ up.double().T)
    # One rounding of the weights to their dtype, over 40 products.
    torch.testing.assert_close(x @ merged.double().T, exact, atol=200 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("sampler", LAYOUTS)
def test_safetensors_and_bin_give_the_same(sampler: ImageSampler, tmp_path: Path) -> None:
    tensors = captioner_tensors(sampler)
    first = logits(converted(tmp_path, tensors))
    save_safetensors(tmp_path / "ShareCaptioner", tensors)
    convert(plan_conversion(tmp_path / "ShareCaptioner"), tmp_path / "again", SHARD)
    again = load_adapter(tmp_path / "again")
    assert isinstance(again, CaptionerAdapter)
    assert torch.equal(logits(again), first)


@pytest.mark.parametrize("sampler", LAYOUTS)
def test_folder_holds_all_that_the_pipeline_needs(sampler: ImageSampler, tmp_path: Path) -> None:
    adapter = converted(tmp_path, captioner_tensors(sampler))
    out = tmp_path / "out"
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2, "do_sample": False}
    assert adapter.protocol == "squash"
    assert adapter.template.image_tokens == (QUERIES if sampler == "resampler" else QUERIES + 2)
    ids = adapter.template.prompt([Turn("user", "ab tata?")])
    assert ids[0] == 1
    assert 3 in ids  # <TOKENS_UNUSED_0>, a control token of the sentencepiece model
    assert sampler in (out / "README.md").read_text()


def test_end_of_answer_is_an_end_token_of_the_full_vocabulary(tmp_path: Path) -> None:
    tensors = captioner_tensors("resampler", vocabulary=103168)
    adapter = converted(tmp_path, tensors)
    assert adapter.eos_token_ids == {2, 103028}


def test_stored_positions_are_taken_when_ours_computes_the_same(tmp_path: Path) -> None:
    tensors = captioner_tensors("resampler")
    stored = sincos_positions(int(QUERIES**0.5), RESAMPLER_WIDTH)
    adapter = converted(tmp_path, tensors | {"Qformer.pos_embed": stored.bfloat16()})
    expected = by_hand.captioner_logits(tensors, BEFORE, AFTER, PIXELS)
    torch.testing.assert_close(logits(adapter), expected, atol=2e-5, rtol=0)


def test_other_stored_positions_are_refused(tmp_path: Path) -> None:
    stored = sincos_positions(int(QUERIES**0.5), RESAMPLER_WIDTH).flip(0)
    model = save_captioner(tmp_path / "x", captioner_tensors("resampler") | {"Qformer.pos_embed": stored})
    with pytest.raises(UserError, match="Qformer.pos_embed is no 2-D sin-cos table"):
        plan_conversion(model)


def test_lora_without_its_alpha_is_refused(tmp_path: Path) -> None:
    model = save_captioner(tmp_path / "x", captioner_tensors("qformer"), internlm_lora=None)
    with pytest.raises(UserError, match="no internlm_lora.lora_alpha"):
        plan_conversion(model)


def test_a_last_block_that_is_missing_is_noticed_at_the_published_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharegpt4v.checkpoints.captioner._DEPTH", {("visual_encoder.blocks.", 176): 2})
    tensors = {n: t for n, t in captioner_tensors("resampler").items() if "visual_encoder.blocks.1." not in n}
    model = save_captioner(tmp_path / "x", tensors)
    with pytest.raises(UserError, match=r"tensors are missing, visual_encoder.blocks.1.* first"):
        plan_conversion(model)


def test_back_to_the_released_layout_is_for_llava_alone(tmp_path: Path) -> None:
    model = save_captioner(tmp_path / "x", captioner_tensors("resampler"))
    with pytest.raises(UserError, match="in the released layout already"):
        plan_conversion(model, to="released")
