"""A language model, a tower and a projector joined: the parts are in the whole, bit by bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionModel, LlamaForCausalLM

from sharegpt4v.errors import UserError
from sharegpt4v.models.load import load_adapter
from sharegpt4v.models.toy import toy_lmm_config
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.train.assemble import assemble


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, config = tmp_path_factory.mktemp("parts"), toy_lmm_config()
    torch.manual_seed(3)
    LlamaForCausalLM(config.text_config).save_pretrained(folder / "vicuna")
    build_tokenizer().save_pretrained(folder / "vicuna")
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "clip")
    return folder / "vicuna", folder / "clip"


def test_the_parts_are_in_the_whole(parts: tuple[Path, Path], tmp_path: Path) -> None:
    assemble(*parts, None, tmp_path / "whole")
    model = load_adapter(tmp_path / "whole").model
    text = LlamaForCausalLM.from_pretrained(parts[0])
    tower = dict(CLIPVisionModel.from_pretrained(parts[1]).named_parameters())
    rows = text.config.vocab_size
    assert torch.equal(model.lm_head.weight[:rows], text.lm_head.weight)
    ours = dict(model.model.language_model.named_parameters())
    for name, value in text.model.named_parameters():
        assert torch.equal(ours[name][: len(value)], value), name
    for name, value in model.model.vision_tower.named_parameters():
        assert torch.equal(value, tower[name]), name


def test_the_same_parts_give_the_same_projector(parts: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assemble(*parts, None, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_projector_in_released_names_is_taken(parts: tuple[Path, Path], tmp_path: Path) -> None:
    assemble(*parts, None, tmp_path / "whole")
    projector = load_adapter(tmp_path / "whole").model.model.multi_modal_projector
    released = {
        f"model.mm_projector.{number}.{kind}": getattr(getattr(projector, layer), kind).detach() + 1
        for number, layer in ((0, "linear_1"), (2, "linear_2"))
        for kind in ("weight", "bias")
    }
    save_file(released, tmp_path / "projector.safetensors")
    assemble(*parts, tmp_path / "projector.safetensors", tmp_path / "with")
    taken = load_adapter(tmp_path / "with").model.model.multi_modal_projector
    assert torch.equal(taken.linear_2.weight, released["model.mm_projector.2.weight"])
    save_file({"0.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="^projector: .* and the projector needs"):
        assemble(*parts, tmp_path / "other.safetensors", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_parts_of_other_families_are_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^language_model: .* holds a 'clip_vision_model' model: give llama"):
        assemble(parts[1], parts[1], None, tmp_path / "whole")
    with pytest.raises(UserError, match="^vision_tower: .* is no transformers folder"):
        assemble(parts[0], tmp_path / "none", None, tmp_path / "whole")
