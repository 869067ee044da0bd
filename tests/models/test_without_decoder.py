"""What an engine with a decoder of its own gets: the same prompts, and no weights that it does not use."""

from pathlib import Path

import pytest
import torch

from sharegpt4v.errors import UserError
from sharegpt4v.models.load import load_adapter, load_without_decoder
from tests.engine.requests import make_request
from tests.models.random_weights import save_random_captioner, save_random_lmm


def test_llava_comes_up_from_its_configuration_alone(tmp_path: Path) -> None:
    folder = save_random_lmm(tmp_path)
    whole = load_adapter(folder, torch.bfloat16)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    adapter = load_without_decoder(folder, torch.bfloat16, "cpu")
    assert {parameter.device.type for parameter in adapter.model.parameters()} == {"meta"}
    request = make_request(whole, 1)
    assert adapter.template.prompt(request.turns) == whole.template.prompt(request.turns)
    for name in ("dtype", "image_size", "protocol", "eos_token_ids"):
        assert getattr(adapter, name) == getattr(whole, name), name
    with pytest.raises(UserError, match="uint8"):
        adapter.check_image(request.images[0][:-1])


def test_llavas_end_tokens_are_those_of_its_generation_config(tmp_path: Path) -> None:
    folder = save_random_lmm(tmp_path)
    file = folder / "generation_config.json"
    file.write_text('{"eos_token_id": [2, 7]}')
    assert load_without_decoder(folder, torch.float32, "cpu").eos_token_ids == {2, 7}
    assert load_adapter(folder).eos_token_ids == {2, 7}


def test_a_captioner_keeps_what_makes_its_prompts(tmp_path: Path) -> None:
    folder = save_random_captioner(tmp_path)
    whole, adapter = load_adapter(folder), load_without_decoder(folder, torch.float32, "cpu")
    request = make_request(whole, 1)
    assert adapter.embed([request])[0].equal(whole.embed([request])[0])
    left = {name for name, _ in adapter.language_model.named_parameters()}
    assert left == {"model.embed_tokens.weight", "model.norm.weight"}
