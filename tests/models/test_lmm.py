"""ShareGPT4V's presets: sizes of the released models, and what vanilla LLaVA makes of them."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sharegpt4v.errors import UserError
from sharegpt4v.models.lmm import share_gpt4v_config


@pytest.mark.parametrize(("preset", "billions"), [("7b", 7.063), ("13b", 13.351)])
def test_full_size_parameter_count(preset: str, billions: float) -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(share_gpt4v_config(preset))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.0005)


def test_full_size_image_becomes_576_tokens_of_the_last_block_but_one() -> None:
    config = share_gpt4v_config("7b")
    with torch.device("meta"):
        tower = LlavaForConditionalGeneration(config).model.vision_tower
        patches = tower.embeddings(torch.empty(1, 3, 336, 336))
    assert patches.shape[1] - 1 == config.image_seq_length == 576
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")


def test_ids_added_to_the_vocabulary_lie_inside_the_table() -> None:
    config = share_gpt4v_config("7b")
    assert (config.image_token_id, config.text_config.pad_token_id) == (32000, 32001)
    assert config.text_config.vocab_size == 32064


def test_toy_features_leave_out_class_token_last_block_and_last_norm() -> None:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(share_gpt4v_config("toy")).eval()
    pixels = torch.randn(2, 3, 48, 48)
    features = torch.stack(model.get_image_features(pixels).pooler_output)
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, model.model.multi_modal_projector(states[-2][:, 1:]))
    assert features.shape == (2, 36, 128)


def test_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match="'70b'; choose one of 7b, 13b, toy"):
        share_gpt4v_config("70b")
