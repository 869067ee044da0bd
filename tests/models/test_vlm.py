"""What the transformers engine cannot run is refused by name, and what it takes from a folder."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sharegpt4v.dialogue import Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.vlm import load_vlm
from tests.models.tiny_vlms import save_qwen

no_torchvision = pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("vlm") / "qwen")


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _another_type(folder: Path) -> None:
    _edit(folder / "config.json", model_type="nobodys_model")


def _a_text_model(folder: Path) -> None:
    _edit(folder / "config.json", model_type="llama")


def _images_for_torchvision(folder: Path) -> None:
    _edit(folder / "preprocessor_config.json", image_processor_type="Lfm2VlImageProcessor")


def _a_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_another_type, "nobodys_model"),
        (_a_text_model, "'llama' model, which transformers does not know as one of images and text"),
        pytest.param(
            _images_for_torchvision, "only torchvision can process their images", marks=no_torchvision
        ),
        (_a_tensor_less, r"1 missing keys, model\..*layers\.1\.mlp\.up_proj\.weight first"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    qwen: Path, tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    folder = _copy(qwen, tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=reason):
        load_vlm(folder)


@pytest.mark.skipif(find_spec("num2words") is not None, reason="num2words is installed")
def test_a_package_that_a_processor_lacks_is_named(qwen: Path, tmp_path: Path) -> None:
    folder = _copy(qwen, tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "smolvlm"}')
    _edit(folder / "preprocessor_config.json", image_processor_type="SmolVLMImageProcessor")
    with pytest.raises(UserError, match="Package 'num2words' is required .*pip install num2words"):
        load_vlm(folder)


def test_surplus_tensors_are_no_fault(qwen: Path, tmp_path: Path) -> None:
    folder = _copy(qwen, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"value_head.weight": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_vlm(folder).eos_token_ids == {0, 2}


def test_an_image_of_three_rows_is_no_image_of_three_channels(qwen: Path) -> None:
    vlm = load_vlm(qwen)
    narrow = np.zeros((3, 60, 3), np.uint8)
    narrow[:, :30] = 255
    wide = vlm.encode((Turn("user", "?", (narrow,)),))["image_grid_thw"].tolist()
    assert wide == [[1, 2, 18]]  # 2 rows and 18 columns of patches, not the other way round


def test_the_folders_sampling_is_not_used_but_its_end_tokens_are(qwen: Path) -> None:
    settings = load_vlm(qwen).model.generation_config
    assert settings.eos_token_id == [2, 0]
    assert (settings.do_sample, settings.temperature, settings.repetition_penalty) in (
        (None, None, None),
        (False, 1.0, 1.0),
    )
