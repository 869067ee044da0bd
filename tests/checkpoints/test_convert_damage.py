"""Damaged weights: bytes that changed, files cut or grown, numbers that are none: named, nothing written."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.convert import main
from sharegpt4v.checkpoints.card import read_card
from sharegpt4v.checkpoints.checksums import Checksums
from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.errors import UserError
from tests.checkpoints.released import (
    captioner_tensors,
    llava_tensors,
    save_captioner,
    save_llava,
    save_safetensors,
    save_tower,
    tower_tensors,
)
from tests.checkpoints.test_convert_faults import line
from tests.models.random_weights import save_random_captioner

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def last_line(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """What the command says below its bar, when it finds the damage while it writes; nothing may be left."""
    out = Path(str(flags[1])).parent / "out"
    assert main([*map(str, flags), "--out", str(out)]) == 2
    assert not out.exists() and not out.with_name("out.partial").exists()
    return capsys.readouterr().err.splitlines()[-1]


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    """Replaces the only place where these bytes stand; the length stays."""
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def test_zeroed_bytes_in_an_archive_are_named_with_the_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = llava_tensors()
    model = save_llava(tmp_path / "model", tensors)
    tower = save_tower(tmp_path / "tower", tower_tensors())
    shard = model / "pytorch_model-00001-of-00002.bin"
    overwrite(shard, tensors[Q_PROJ].numpy().tobytes()[128:192], bytes(64))
    said = last_line(capsys, "--checkpoint", model, "--vision-tower", tower)
    assert f"{shard}: the bytes of {Q_PROJ} do not match the checksum" in said


def test_zeroed_bytes_in_the_table_of_an_archive_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llava(tmp_path / "model", llava_tensors())
    shard = model / "pytorch_model-00001-of-00002.bin"
    with zipfile.ZipFile(shard) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        table = archive.read(name)
    overwrite(shard, table, table.replace(b"model.layers.0", b"model.layers.7"))
    assert f"cannot read {shard}" in line(capsys, "--checkpoint", model)


def test_archive_without_checksums_is_taken(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    finally:
        torch.serialization.set_crc32_options(True)
    convert(plan_conversion(model), tmp_path / "out", 10**9)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_storage_that_tensors_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(100, 8)
    torch.save({"table": table, "part": table[5:9]}, tmp_path / "x.bin")
    tensors = torch.load(tmp_path / "x.bin", mmap=True, weights_only=True)
    checksums = Checksums(tmp_path / "x.bin")
    assert checksums.match(tensors["part"])
    monkeypatch.setattr("sharegpt4v.checkpoints.checksums.zlib.crc32", lambda _: pytest.fail("read again"))
    assert checksums.match(tensors["table"])


@pytest.mark.parametrize("change", ["cut", "grown", "other shape"])
def test_safetensors_whose_bytes_are_not_all_accounted_for_is_refused(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_captioner(tmp_path / "model", captioner_tensors("resampler"))
    save_safetensors(model, captioner_tensors("resampler"))
    path = model / "model.safetensors"
    content = path.read_bytes()
    if change == "other shape":
        content = content.replace(b'"shape":[1,1,176]', b'"shape":[1,2,176]')
    path.write_bytes(content[:-8] if change == "cut" else content + b"\0" * 8 * (change == "grown"))
    assert f"cannot read {path}" in line(capsys, "--checkpoint", model)


@pytest.mark.parametrize("change", [-8, 8])
def test_card_of_a_folder_with_a_file_of_another_size_is_refused(change: int, tmp_path: Path) -> None:
    """The driver reads headers alone: without this a cut copy is found by every actor, after the start."""
    folder = save_random_captioner(tmp_path / "model")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    size = len(content)
    with pytest.raises(UserError, match=rf"is {size + change:,} bytes, its header says {size:,}: copy"):
        read_card(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_that_is_no_number_is_named(
    value: float, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = llava_tensors(dtype=dtype)
    tensors[Q_PROJ][3, 17] = tensors[Q_PROJ][5, 0] = value
    model = save_llava(tmp_path / "model", tensors)
    tower = save_tower(tmp_path / "tower", tower_tensors())
    said = last_line(capsys, "--checkpoint", model, "--vision-tower", tower)
    assert f"{Q_PROJ} holds NaN or infinite numbers, 2 of 4,096, [3, 17] first" in said


def test_lora_that_is_no_number_is_named_and_not_the_weight_it_goes_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = captioner_tensors("qformer")
    name = "internlm_model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[name][0, 0] = float("nan")
    model = save_captioner(tmp_path / "model", tensors)
    assert f"{name} holds NaN" in last_line(capsys, "--checkpoint", model)


def test_merged_weight_beyond_its_dtype_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = captioner_tensors("qformer", dtype=torch.float16)
    for half in "AB":
        tensors[f"internlm_model.model.layers.0.mlp.up_proj.lora_{half}.weight"].fill_(1000)
    model = save_captioner(tmp_path / "model", tensors)
    said = last_line(capsys, "--checkpoint", model)
    assert "layers.0.mlp.up_proj.weight: merged numbers exceed what float16 holds" in said


def test_whole_checkpoint_of_safetensors_is_not_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_captioner(folder, captioner_tensors("qformer"))
    save_file(captioner_tensors("qformer"), folder / "model.safetensors")
    assert main(["--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 0
