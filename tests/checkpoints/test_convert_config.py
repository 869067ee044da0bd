"""Configurations that do not fit: named before anything is written, and kept true on the way back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.models.load import load_adapter
from tests.checkpoints.released import (
    ROPE_THETA,
    captioner_tensors,
    llava_tensors,
    pieces,
    save_captioner,
    save_llava,
    save_tower,
    sentencepiece_model,
    tower_tensors,
)
from tests.checkpoints.test_convert_faults import line

MODEL: dict[str, tuple[Any, str]] = {
    "rms_norm_eps": (None, "rms_norm_eps is None, a number above 0 is expected"),
    "hidden_size": ("64", "hidden_size is '64', a whole number from 1 on is expected"),
    "num_attention_heads": (0, "num_attention_heads is 0, a whole number from 1 on"),
    "max_position_embeddings": (4096.0, "max_position_embeddings is 4096.0, a whole number"),
    "rope_theta": (float("nan"), "rope_theta is nan, a number above 0 is expected"),
    "num_key_value_heads": ("all", "describes no model"),
    "hidden_act": ("nope", "describes no model: KeyError: 'nope'"),
    "mm_vision_select_layer": (-9, "features are those of block -9, and the vision tower has 3 blocks"),
    "mm_vision_select_feature": ("both", "mm_vision_select_feature is 'both' in config.json; LLaVA-1.5 and"),
    "image_aspect_ratio": ("anyres", "image_aspect_ratio is 'anyres' in config.json"),
    "mm_projector_type": ("linear", "mm_projector_type is 'linear' in config.json"),
    "mm_use_im_start_end": (True, "mm_use_im_start_end is True in config.json"),
}

CAPTIONER: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"internlm_lora": {"lora_alpha": "big"}}, "lora_alpha is 'big' in config.json, a number above"),
    "rank": (
        {"internlm_lora": {"lora_alpha": 12, "lora_r": 16}},
        "has rank 8, and config.json says lora_r 16",
    ),
    "no table": ({"internlm_lora": 7}, "internlm_lora is 7 in config.json"),
}


@pytest.mark.parametrize("key", MODEL)
def test_value_that_makes_no_model_is_named(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, expected = MODEL[key]
    model = save_llava(tmp_path / "model", llava_tensors(), **{key: value})
    tower = save_tower(tmp_path / "tower", tower_tensors())
    assert expected in line(capsys, "--checkpoint", model, "--vision-tower", tower)


def test_value_of_the_tower_is_named_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    tower = save_tower(tmp_path / "tower", tower_tensors())
    config = json.loads((tower / "config.json").read_text())
    for changed in ({"patch_size": 0}, {"hidden_act": "nope"}, {"intermediate_size": -5}):
        (tower / "config.json").write_text(json.dumps(config | changed))
        said = line(capsys, "--checkpoint", model, "--vision-tower", tower)
        assert f"{tower / 'config.json'} describes no model" in said


@pytest.mark.parametrize("fault", CAPTIONER)
def test_lora_that_does_not_fit_its_configuration_is_named(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, expected = CAPTIONER[fault]
    model = save_captioner(tmp_path / "model", captioner_tensors("qformer"), **changed)
    assert expected in line(capsys, "--checkpoint", model)


def test_tower_with_a_tensor_under_two_names_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    name = "encoder.layers.0.mlp.fc1.weight"
    twice = tower_tensors() | {name: torch.zeros(80, 64)}
    tower = save_tower(tmp_path / "tower", twice)
    said = line(capsys, "--checkpoint", model, "--vision-tower", tower)
    assert f"vision_model.{name} and {name} would both be vision_model.{name}" in said


def test_fault_of_the_tower_is_said_of_its_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    tensors = tower_tensors()
    del tensors["vision_model.encoder.layers.2.mlp.fc2.bias"]
    tower = save_tower(tmp_path / "tower", tensors)
    assert f"{tower}: 1 tensor is missing" in line(capsys, "--checkpoint", model, "--vision-tower", tower)


def test_quantised_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = llava_tensors()
    model = save_llava(tmp_path / "model", tensors | {name: tensors[name].to(torch.int8)})
    tower = save_tower(tmp_path / "tower", tower_tensors())
    said = line(capsys, "--checkpoint", model, "--vision-tower", tower)
    assert f"{name} is of int8; weights of float64, float32, float16, bfloat16 are read" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS and not the file",
        ),
        (b"<html>not found</html>", "no archive as torch.save writes it since 1.6"),
    ],
)
def test_file_that_is_no_checkpoint_is_told_apart(
    content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert expected in line(capsys, "--checkpoint", folder)


@pytest.mark.parametrize("content", [{"weight_map": ["a"]}, {}, {"weight_map": {"a": 1}}])
def test_index_without_files_is_named(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    assert "has no weight_map from names to files" in line(capsys, "--checkpoint", folder)


def test_folder_that_is_not_there_is_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere is not there" in line(capsys, "--checkpoint", tmp_path / "nowhere")


def test_tokenizer_without_the_captioners_tokens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    other = save_llava(tmp_path / "other", llava_tensors())
    said = line(capsys, "--checkpoint", model, "--tokenizer", other)
    assert f"--tokenizer: the one in {other} does not know <TOKENS_UNUSED_0>" in said
    larger = save_captioner(tmp_path / "larger", captioner_tensors("resampler", vocabulary=330))
    said = line(capsys, "--checkpoint", model, "--tokenizer", larger)
    assert "has 330 tokens, the model's table 320 rows" in said
    (other / "tokenizer.json").write_text("{")
    said = line(capsys, "--checkpoint", model, "--tokenizer", other)
    assert f"cannot read {other / 'tokenizer.json'}" in said


def test_features_with_the_class_token_are_counted_with_it(tmp_path: Path) -> None:
    model = save_llava(tmp_path / "model", llava_tensors(), mm_vision_select_feature="cls_patch")
    tower = save_tower(tmp_path / "tower", tower_tensors())
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", 10**9)
    adapter = load_adapter(tmp_path / "out")
    assert adapter.template.image_tokens == 5
    assert adapter.image_features(torch.zeros(1, 3, 28, 28)).shape == (1, 5, 64)


def converted(tmp_path: Path) -> Path:
    model = save_llava(tmp_path / "model", llava_tensors())
    tower = save_tower(tmp_path / "tower", tower_tensors())
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", 10**9)
    return tmp_path / "out"


def change(folder: Path, config: dict[str, Any], text: dict[str, Any]) -> None:
    content = json.loads((folder / "config.json").read_text()) | config
    content["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(content))


def test_way_back_says_what_training_changed_in_the_language_model(tmp_path: Path) -> None:
    out = converted(tmp_path)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0}
    change(out, {}, {"rope_parameters": rope, "max_position_embeddings": 8192})
    kept = json.loads((out / "released" / "config.json").read_text())
    (out / "released" / "config.json").write_text(json.dumps(kept | {"freeze_mm_mlp_adapter": False}))
    convert(plan_conversion(out, "released"), tmp_path / "back", 10**9)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert (back["rope_theta"], back["max_position_embeddings"]) == (7000.0, 8192)
    assert back["freeze_mm_mlp_adapter"] is False  # of keys that we do not know
    again = plan_conversion(tmp_path / "back", vision_tower=tmp_path / "back" / "vision_tower")
    convert(again, tmp_path / "again", 10**9)
    got = json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]["rope_parameters"]
    assert {key: got[key] for key in rope} == rope


def test_way_back_says_what_training_changed_in_how_images_enter(tmp_path: Path) -> None:
    out = converted(tmp_path)
    change(out, {"image_protocol": "crop"}, {})
    convert(plan_conversion(out, "released"), tmp_path / "back", 10**9)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["image_aspect_ratio"] == "square"


def test_way_back_says_the_dtype_that_is_written(tmp_path: Path) -> None:
    out = converted(tmp_path)
    kept = json.loads((out / "released" / "config.json").read_text())
    (out / "released" / "config.json").write_text(json.dumps(kept | {"torch_dtype": "float16"}))
    convert(plan_conversion(out, "released"), tmp_path / "back", 10**9)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "is not JSON"), (json.dumps({"hidden_size": "x"}), "released/config.json describes no model")],
)
def test_kept_configuration_that_is_broken_is_named_before_anything_is_written(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = converted(tmp_path).rename(tmp_path / "mine")
    (out / "released" / "config.json").write_text(content)
    assert expected in line(capsys, "--checkpoint", out, "--to", "released")


def test_tokenizer_of_the_way_back_must_fit_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = converted(tmp_path).rename(tmp_path / "mine")
    flags = ("--checkpoint", out, "--to", "released", "--tokenizer")
    assert "has neither tokenizer.json" in line(capsys, *flags, tmp_path / "nowhere")
    larger = save_llava(tmp_path / "larger", llava_tensors(vocabulary=330))
    assert "gives <image> the id 330, the model's is 320" in line(capsys, *flags, larger)


def test_way_back_keeps_the_released_files_that_still_hold(tmp_path: Path) -> None:
    out = converted(tmp_path)
    convert(plan_conversion(out, "released"), tmp_path / "back", 10**9)
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize("kind", ["no originals", "empty originals", "tokenizer.json alone"])
def test_way_back_has_a_tokenizer(kind: str, tmp_path: Path) -> None:
    out = converted(tmp_path)
    shutil.rmtree(out / "released")
    if kind == "empty originals":
        (out / "released").mkdir()
    if kind == "tokenizer.json alone":
        (out / "tokenizer.model").unlink()
    convert(plan_conversion(out, "released"), tmp_path / "back", 10**9)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_theta"] == ROPE_THETA
    if kind == "tokenizer.json alone":
        assert Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json")).token_to_id("<image>") == 320
    else:
        words = (tmp_path / "back" / "tokenizer.model").read_bytes()
        assert words == (out / "tokenizer.model").read_bytes()
    assert plan_conversion(tmp_path / "back", vision_tower=tmp_path / "back" / "vision_tower").bytes > 0


def test_way_back_takes_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    out = converted(tmp_path)
    (out / "released" / "tokenizer.json").write_text("of the one that came with it")
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(sentencepiece_model(pieces(320, ("<mine>",))))
    convert(plan_conversion(out, "released", tokenizer=other), tmp_path / "back", 10**9)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (other / "tokenizer.model").read_bytes()
    assert not (tmp_path / "back" / "tokenizer.json").exists()
