"""Relatives of LLaVA-1.5 whose tensors have its names: refused by theirs, before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from sharegpt4v.checkpoints.convert import plan_conversion
from tests.checkpoints.released import llava_tensors, save_llava, save_tower, tower_tensors
from tests.checkpoints.test_convert_faults import line
from tests.models.random_weights import save_random_lmm

RELEASED: dict[str, tuple[dict[str, Any], str]] = {
    "mistral with a window": (
        {
            "model_type": "llava_mistral",
            "architectures": ["LlavaMistralForCausalLM"],
            "sliding_window": 4096,
        },
        "model_type is 'llava_mistral', this is LLaVA on Mistral",
    ),
    "qwen": (
        {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]},
        "model_type is 'llava_qwen', this is LLaVA on Qwen",
    ),
    "known type of another class": (
        {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]},
        "architectures is 'LlavaQwenForCausalLM', this is LLaVA on Qwen",
    ),
    "next on llama": (
        {"model_type": "llava_llama", "mm_patch_merge_type": "spatial_unpad"},
        "mm_patch_merge_type is 'spatial_unpad', this is LLaVA-NeXT",
    ),
    "window under a known name": (
        {"model_type": "llava_llama", "sliding_window": 4096},
        "sliding_window is 4096",
    ),
    "unknown": ({"model_type": "cambrian_llama"}, "model_type is 'cambrian_llama'; LLaVA-1.5 and ShareGPT4V"),
}

TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "next": ({"model_type": "llava_next"}, "model_type is 'llava_next', this is LLaVA-NeXT"),
    "onevision": ({"model_type": "llava_onevision"}, "this is LLaVA-OneVision"),
    "mistral": (
        {"text_config": {"model_type": "mistral"}},
        "text_config is of 'mistral', this is LLaVA on Mistral; LLaVA-1.5 is converted, which has llama",
    ),
    "qwen": ({"text_config": {"model_type": "qwen2"}}, "text_config is of 'qwen2', this is LLaVA on Qwen"),
    "siglip": (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "vision_config is of 'siglip_vision_model'; LLaVA-1.5 is converted, which has clip_vision_model",
    ),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_released_relative_is_refused_by_its_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, expected = RELEASED[kind]
    model = save_llava(tmp_path / "model", llava_tensors(), **({"architectures": None} | said))
    tower = save_tower(tmp_path / "tower", tower_tensors())
    assert expected in line(capsys, "--checkpoint", model, "--vision-tower", tower)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_relative_in_transformers_layout_is_refused_by_its_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, expected = TRANSFORMERS[kind]
    model = save_random_lmm(tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    for key, value in changed.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (model / "config.json").write_text(json.dumps(content))
    assert expected in line(capsys, "--checkpoint", model)


def test_tower_that_is_not_clips_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    tower = save_tower(tmp_path / "tower", tower_tensors())
    content = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps(content | {"model_type": "siglip_vision_model"}))
    said = line(capsys, "--checkpoint", model, "--vision-tower", tower)
    assert "--vision-tower: " in said and "model_type is 'siglip_vision_model'" in said


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},  # LLaVA-1.5 before the rename
        {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_patch_merge_type": "flat",
        },
        {"model_type": None, "architectures": None, "sliding_window": None},
    ],
)
def test_llava_on_llama_is_taken(said: dict[str, Any], tmp_path: Path) -> None:
    model = save_llava(tmp_path / "model", llava_tensors(), **said)
    tower = save_tower(tmp_path / "tower", tower_tensors())
    assert plan_conversion(model, vision_tower=tower).bytes > 0
