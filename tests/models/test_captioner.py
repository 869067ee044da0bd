"""Share-Captioner in both layouts: sizes, the resampler by hand, image slots, saving and loading."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import (
    IMAGE_PLACEHOLDER,
    ImageSampler,
    ShareCaptioner,
    resize_positions,
    share_captioner_7b,
    sincos_positions,
)
from sharegpt4v.models.toy import toy_captioner_config

LAYOUTS: list[ImageSampler] = ["resampler", "qformer"]


def toy_captioner(sampler: ImageSampler = "resampler") -> ShareCaptioner:
    torch.manual_seed(0)
    model = ShareCaptioner(toy_captioner_config(sampler))
    model.eval()
    return model


def toy_pixels(images: int) -> Tensor:
    return torch.randn(images, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("sampler", "billions", "image_tokens"), [("resampler", 8.40, 256), ("qformer", 8.42, 66)]
)
def test_full_size_has_the_released_number_of_parameters(
    sampler: ImageSampler, billions: float, image_tokens: int
) -> None:
    config = share_captioner_7b(sampler)
    with torch.device("meta"):
        model = ShareCaptioner(config)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.005)
    assert config.image_tokens == image_tokens


@pytest.mark.parametrize("sampler", LAYOUTS)
def test_full_size_vision_tower_sees_1025_tokens_through_39_blocks(sampler: ImageSampler) -> None:
    with torch.device("meta"):
        model = ShareCaptioner(share_captioner_7b(sampler))
        patches = model.vision_model.embeddings(torch.empty(1, 3, 448, 448))
    assert patches.shape == (1, 1025, 1408)
    assert len(model.vision_model.encoder.layers) == 39


def test_only_the_qformer_layout_has_ln_vision() -> None:
    def has_ln_vision(sampler: ImageSampler) -> bool:
        return any("post_layernorm" in name for name in toy_captioner(sampler).state_dict())

    assert not has_ln_vision("resampler")
    assert has_ln_vision("qformer")


def test_language_model_has_biases_in_attention_and_none_in_the_mlp() -> None:
    biased = {
        name.split(".")[-2] for name in toy_captioner().language_model.state_dict() if name.endswith("bias")
    }
    assert biased == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_positions_vary_by_column_in_the_first_half_and_by_row_in_the_second() -> None:
    table = sincos_positions(side=3, width=8).view(3, 3, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    # Column 2, frequencies 1 and 1/100.
    angles = torch.tensor([2.0, 0.02])
    torch.testing.assert_close(table[1, 2, :4], torch.cat([angles.sin(), angles.cos()]))


def test_resized_positions_keep_a_table_of_the_same_side() -> None:
    table = sincos_positions(side=4, width=16)
    torch.testing.assert_close(resize_positions(table, 4), table)


def test_resized_positions_put_rows_before_columns() -> None:
    resized = resize_positions(sincos_positions(side=4, width=8), 6).view(6, 6, 8)
    torch.testing.assert_close(resized[0, :, :4], resized[5, :, :4])
    assert not torch.allclose(resized[:, 0, 4:], resized[:, :1, 4:][0].expand(6, -1))


def test_resampler_equals_attention_written_out() -> None:
    resampler = toy_captioner().resampler
    patches = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(2))
    values = nn.functional.layer_norm(patches @ resampler.kv_proj.weight.T, (128,), eps=1e-6)
    keys = values + resize_positions(sincos_positions(6, 128), 8)
    queries = nn.functional.layer_norm(resampler.query, (128,), eps=1e-6) + sincos_positions(6, 128)
    projections = zip(
        resampler.attn.in_proj_weight.chunk(3), resampler.attn.in_proj_bias.chunk(3), strict=True
    )
    q, k, v = (
        (x @ weight.T + bias).reshape(*x.shape[:-1], 4, 32).transpose(-2, -3)
        for x, (weight, bias) in zip((queries, keys, values), projections, strict=True)
    )
    attended = ((q @ k.transpose(-1, -2)) / 32**0.5).softmax(-1) @ v
    expected = attended.transpose(-2, -3).flatten(-2) @ resampler.attn.out_proj.weight.T
    torch.testing.assert_close(resampler(patches), expected)


def test_untrained_queries_look_at_their_own_place() -> None:
    resampler = toy_captioner().resampler
    patches = torch.randn(64, 64, 96, generator=torch.Generator().manual_seed(2))
    values = resampler.ln_kv(resampler.kv_proj(patches))
    queries = (resampler.ln_q(resampler.query) + resampler.query_positions).expand(64, -1, -1)
    _, weights = resampler.attn(queries, values + resampler.key_positions, values)
    weights = weights.mean(0).view(6, 6, 8, 8)
    # Queries of the corners, on a 6 x 6 grid, against patches of the same corner, 2 x 2 of 64.
    corners = [weights[r, c, 6 * (r > 0) :][:2, 6 * (c > 0) :][:, :2].sum() for r in (0, 5) for c in (0, 5)]
    assert min(corners) > 1.5 * 4 / 64  # even attention would give 4 of 64


def test_number_of_resampler_queries_must_be_a_square() -> None:
    config = toy_captioner_config()
    config.num_queries = 15
    with pytest.raises(UserError, match="num_queries is 15"):
        ShareCaptioner(config)


def test_qformer_without_its_configuration_is_refused() -> None:
    config = toy_captioner_config()
    config.sampler = "qformer"
    with pytest.raises(UserError, match="there is no qformer_config"):
        ShareCaptioner(config)


def test_unknown_sampler_is_refused() -> None:
    config = toy_captioner_config()
    config.sampler = "pooling"
    with pytest.raises(UserError, match="'pooling'; choose resampler or qformer"):
        ShareCaptioner(config)


def test_qformer_layout_wraps_its_queries_in_start_and_end() -> None:
    model = toy_captioner("qformer")
    features = model.image_features(toy_pixels(2))
    assert features.shape == (2, 38, 128)
    assert torch.equal(features[0, 0], model.start_embedding[0, 0])
    assert torch.equal(features[1, -1], model.end_embedding[0, 0])


@pytest.mark.parametrize("sampler", LAYOUTS)
def test_image_features_tell_two_images_apart(sampler: ImageSampler) -> None:
    features = toy_captioner(sampler).image_features(toy_pixels(2))
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_image_slots_are_filled_in_order() -> None:
    model = toy_captioner()
    pixels = toy_pixels(2)
    slots = [IMAGE_PLACEHOLDER] * 36
    input_ids = torch.tensor([[1, *slots, 9], [*slots, 8, 9]])
    embedded = model.embed(input_ids, pixels)
    features = model.image_features(pixels)
    torch.testing.assert_close(embedded[0, 1:37], features[0])
    torch.testing.assert_close(embedded[1, :36], features[1])
    assert torch.equal(embedded[0, 37], model.language_model.model.embed_tokens.weight[9])


def test_slots_and_embeddings_that_differ_are_refused_with_both_counts() -> None:
    with pytest.raises(UserError, match="15 image slots in the text, 36 embeddings from 1 images"):
        toy_captioner().embed(torch.tensor([[1, *[IMAGE_PLACEHOLDER] * 15]]), toy_pixels(1))


@pytest.mark.parametrize("sampler", LAYOUTS)
def test_loss_reaches_every_part(sampler: ImageSampler) -> None:
    model = toy_captioner(sampler).train()
    input_ids = torch.tensor([[1, *[IMAGE_PLACEHOLDER] * model.config.image_tokens, 9, 10]])
    labels = input_ids.where(input_ids > 1, -100)
    loss = model(input_ids, toy_pixels(1), labels=labels).loss
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("sampler", LAYOUTS)
def test_saved_in_shards_and_loaded_it_computes_the_same(sampler: ImageSampler, tmp_path: Path) -> None:
    model = toy_captioner(sampler)
    # Away from where training starts: loading must not set a tensor back to its start.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 0.05))
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    loaded, info = ShareCaptioner.from_pretrained(tmp_path, output_loading_info=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not any(info.values())
    saved = model.state_dict()
    assert [
        name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, saved[name])
    ] == []
    input_ids = torch.tensor([[1, *[IMAGE_PLACEHOLDER] * model.config.image_tokens, 9]])
    assert torch.equal(loaded(input_ids, toy_pixels(1)).logits, model(input_ids, toy_pixels(1)).logits)
