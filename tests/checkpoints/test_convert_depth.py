"""Checkpoints with more or fewer blocks than expected: the message says how many those are, and why."""

import json
from pathlib import Path

import pytest

from tests.checkpoints.released import (
    Tensors,
    captioner_tensors,
    llava_tensors,
    save_captioner,
    save_llava,
    save_tower,
    tower_tensors,
)
from tests.checkpoints.test_convert_faults import line
from tests.models.random_weights import save_random_lmm


def without_block(tensors: Tensors, at: str) -> Tensors:
    assert any(name.startswith(at) for name in tensors)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(at)}


@pytest.mark.parametrize(("assumed", "word"), [(24, "missing"), (1, "without a place in this layout")])
def test_depth_assumed_of_a_tower_inside_is_said(
    assumed: int,
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sharegpt4v.checkpoints.llava._DEPTH", {64: assumed})
    inside = {f"model.vision_tower.vision_tower.{name}": t for name, t in tower_tensors().items()}
    model = save_llava(tmp_path / "model", llava_tensors() | inside, mm_vision_select_layer=-1)
    said = line(capsys, "--checkpoint", model)
    assert word in said
    assert f"(blocks: {assumed} assumed at width 64, 3 in the checkpoint)" in said


def test_depth_of_a_tower_beside_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    tensors = without_block(tower_tensors(), "vision_model.encoder.layers.2.")
    tower = save_tower(tmp_path / "tower", tensors)
    said = line(capsys, "--checkpoint", model, "--vision-tower", tower)
    assert "(blocks: 3 by its config.json, 2 in the checkpoint); copy the checkpoint again" in said


@pytest.mark.parametrize(
    ("assumed", "at", "expected"),
    [
        (("visual_encoder.blocks.", 176), "visual_encoder.blocks.1.", "2 assumed at width 176, 1 in"),
        (
            ("Qformer.bert.encoder.layer.", 128),
            "Qformer.bert.encoder.layer.1.",
            "2 assumed at width 128, 1 in",
        ),
        (None, "internlm_model.model.layers.1.", "2 by config.json, 1 in"),
    ],
)
def test_depth_assumed_of_the_captioner_is_said(
    assumed: tuple[str, int] | None,
    at: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sharegpt4v.checkpoints.captioner._DEPTH", {assumed: 2} if assumed else {})
    model = save_captioner(tmp_path / "model", without_block(captioner_tensors("qformer"), at))
    assert f"(blocks: {expected} the checkpoint)" in line(capsys, "--checkpoint", model)


def test_depth_in_the_layout_of_transformers_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_random_lmm(tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    content["text_config"]["num_hidden_layers"] = 5
    (model / "config.json").write_text(json.dumps(content))
    assert "(blocks: 5 by config.json, 3 in the checkpoint)" in line(capsys, "--checkpoint", model)


def test_tensor_missing_inside_a_block_says_nothing_of_depths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = llava_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    model = save_llava(tmp_path / "model", tensors)
    tower = save_tower(tmp_path / "tower", tower_tensors())
    assert "blocks:" not in line(capsys, "--checkpoint", model, "--vision-tower", tower)
