"""What a user can get wrong with `sharegpt4v convert`: one line that names the tensor, file or flag."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.convert import main
from sharegpt4v.models.toy import toy_lmm_config
from tests.checkpoints.released import (
    Tensors,
    captioner_tensors,
    llava_tensors,
    save_captioner,
    save_llava,
    save_tower,
    tower_tensors,
)
from tests.models.random_weights import save_random_captioner, save_random_lmm


def without(tensors: Tensors, name: str) -> Tensors:
    assert name in tensors
    return {key: tensor for key, tensor in tensors.items() if key != name}


def other_shape(tensors: Tensors, name: str) -> Tensors:
    return tensors | {name: tensors[name][..., :-1].clone()}


LLAVA_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        lambda t: without(t, "model.layers.1.mlp.up_proj.weight"),
        "1 tensor is missing, model.layers.1.mlp.up_proj.weight first",
    ),
    "projector missing": (
        lambda t: without(t, "model.mm_projector.2.bias"),
        "1 tensor is missing, model.mm_projector.2.bias first",
    ),
    "surplus": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
        "1 tensor is without a place in this layout, model.layers.0.self_attn.q_proj.bias first",
    ),
    "misshapen": (
        lambda t: other_shape(t, "model.layers.0.mlp.down_proj.weight"),
        "model.layers.0.mlp.down_proj.weight is 64 x 95, its configuration makes it 64 x 96",
    ),
    "table too small": (
        lambda t: t | {"lm_head.weight": t["lm_head.weight"][:-2].clone()},
        "lm_head.weight is 318 x 64, its configuration makes it 320 x 64",
    ),
}

TOWER_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        lambda t: without(t, "vision_model.encoder.layers.2.mlp.fc2.bias"),
        "1 tensor is missing, vision_model.encoder.layers.2.mlp.fc2.bias first",
    ),
    "surplus": (
        lambda t: t | {"vision_model.head.weight": torch.ones(2)},
        "1 tensor is without a place in this layout, vision_model.head.weight first",
    ),
    "misshapen": (
        lambda t: other_shape(t, "vision_model.embeddings.class_embedding"),
        "vision_model.embeddings.class_embedding is 63, its configuration makes it 64",
    ),
}

CAPTIONER_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        lambda t: without(t, "visual_encoder.blocks.1.attn.v_bias"),
        "1 tensor is missing, visual_encoder.blocks.1.attn.v_bias first",
    ),
    "half of a LoRA pair": (
        lambda t: without(t, "internlm_model.model.layers.0.mlp.up_proj.lora_B.weight"),
        "1 tensor is missing, internlm_model.model.layers.0.mlp.up_proj.lora_B.weight first",
    ),
    "other half": (
        lambda t: without(t, "internlm_model.model.layers.0.mlp.up_proj.lora_A.weight"),
        "1 tensor is without a place in this layout, internlm_model.model.layers.0.mlp.up_proj.lora_B.weight",
    ),
    "no sizes": (
        lambda t: without(t, "visual_encoder.pos_embed"),
        "1 tensor is missing, visual_encoder.pos_embed",
    ),
    "misshapen": (
        lambda t: other_shape(t, "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"),
        "Qformer.bert.encoder.layer.0.crossattention.self.key.weight is 128 x 175, its configuration makes",
    ),
}


def line(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """What the command says on its only line of standard error; it must end with code 2 and write nothing."""
    out = Path(str(flags[1])).parent / "out"
    capsys.readouterr()  # what transformers said while a test saved a model
    code = main([*map(str, flags), "--out", str(out)])
    said = capsys.readouterr().err
    assert (code, said.count("\n"), out.exists()) == (2, 1, False), said
    return said


@pytest.mark.parametrize("fault", LLAVA_FAULTS)
def test_fault_in_the_language_model_is_named(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = LLAVA_FAULTS[fault]
    model = save_llava(tmp_path / "model", change(llava_tensors()))
    tower = save_tower(tmp_path / "tower", tower_tensors())
    assert expected in line(capsys, "--checkpoint", model, "--vision-tower", tower)


@pytest.mark.parametrize("fault", TOWER_FAULTS)
def test_fault_in_the_tower_is_named(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = TOWER_FAULTS[fault]
    model = save_llava(tmp_path / "model", llava_tensors())
    tower = save_tower(tmp_path / "tower", change(tower_tensors()))
    assert expected in line(capsys, "--checkpoint", model, "--vision-tower", tower)


@pytest.mark.parametrize("fault", CAPTIONER_FAULTS)
def test_fault_in_the_captioner_is_named(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = CAPTIONER_FAULTS[fault]
    model = save_captioner(tmp_path / "model", change(captioner_tensors("qformer")))
    assert expected in line(capsys, "--checkpoint", model)


def test_tower_that_was_not_given_is_asked_for_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    said = line(capsys, "--checkpoint", model)
    assert "convert: --vision-tower: " in said
    assert "give a folder with Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12" in said


def test_second_tower_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = {f"model.vision_tower.vision_tower.{name}": t for name, t in tower_tensors().items()}
    model = save_llava(tmp_path / "model", llava_tensors() | inside)
    tower = save_tower(tmp_path / "tower", tower_tensors())
    assert "holds its own: leave it out" in line(capsys, "--checkpoint", model, "--vision-tower", tower)


def test_shard_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    assert "names pytorch_model-00002-of-00002.bin, which is not there" in line(capsys, "--checkpoint", model)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shard_cut_short_is_named(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = tmp_path / "model"
    tower.mkdir()
    path = tower / ("pytorch_model.bin" if suffix == ".bin" else "model.safetensors")
    (torch.save if suffix == ".bin" else save_file)({"lm_head.weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert f"cannot read {path}" in line(capsys, "--checkpoint", tower)


def test_pickle_that_could_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return Path(tmp_path / "run").write_text, ("code ran",)

    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    assert "holds more than tensors, which could run code; refused" in line(capsys, "--checkpoint", folder)
    assert not (tmp_path / "run").exists()


def test_file_of_the_old_pickle_format_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": [1, 2]}))
    assert str(folder) in line(capsys, "--checkpoint", folder)


def test_foreign_checkpoint_is_told_by_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"bert.pooler.dense.weight": torch.ones(2)}, folder / "model.safetensors")
    assert "neither LLaVA nor Share-Captioner" in line(capsys, "--checkpoint", folder)


def test_captioner_of_ours_needs_no_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = save_random_captioner(tmp_path / "model")
    assert "a Share-Captioner of ours already" in line(capsys, "--checkpoint", ours)


def test_folder_without_weights_or_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "model"
    empty.mkdir()
    assert "holds no weights" in line(capsys, "--checkpoint", empty)
    save_captioner(empty, captioner_tensors("resampler"))
    (empty / "config.json").unlink()
    assert f"cannot read {empty / 'config.json'}" in line(capsys, "--checkpoint", empty)


def test_configuration_without_a_size_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    config = json.loads((model / "config.json").read_text())
    del config["num_attention_heads"]
    (model / "config.json").write_text(json.dumps(config))
    assert "has no num_attention_heads" in line(capsys, "--checkpoint", model)


def test_tokenizer_that_does_not_fit_is_found_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    tower = save_tower(tmp_path / "tower", tower_tensors())
    other = save_llava(tmp_path / "other", llava_tensors(vocabulary=330))
    flags = ("--checkpoint", model, "--vision-tower", tower)
    said = line(capsys, *flags, "--tokenizer", other)
    assert "gives <image> the id 330, the model's is 320" in said
    (model / "tokenizer.model").unlink()
    assert "--tokenizer: " in line(capsys, *flags)


def test_image_token_inside_the_vocabulary_has_no_way_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = save_random_lmm(tmp_path / "model")
    assert toy_lmm_config().image_token_index == 3
    said = line(capsys, "--checkpoint", toy, "--to", "released")
    assert "<image> is 3 in a table of 512 rows" in said


def test_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["--checkpoint", str(model), "--out", str(out)]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_dry_run_says_what_would_be_made_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("qformer"))
    assert main(["--checkpoint", str(model), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "released Share-Captioner, qformer -> ours" in said
    assert "8 with LoRA" in said
    assert not (tmp_path / "out").exists()


def test_command_writes_the_folder_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    out = tmp_path / "out"
    assert main(["--checkpoint", str(model), "--out", str(out), "--shard-gb", "0.0004"]) == 0
    assert f"GB written to {out}" in capsys.readouterr().out
    assert (out / "model.safetensors.index.json").exists()
    assert not out.with_name("out.partial").exists()
