"""Released ShareGPT4V and LLaVA-1.5 <-> transformers: same logits, same names for others, same bits back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.dialogue import ImageProtocol, Turn
from sharegpt4v.images import prepare
from sharegpt4v.models.load import load_adapter
from tests.checkpoints.released import (
    TOWER,
    Tensors,
    llava_tensors,
    save_llava,
    save_safetensors,
    save_tower,
    tower_tensors,
)
from tests.models import by_hand
from tests.models.random_weights import save_random_lmm

SHARD = 300_000  # bytes, so that everything comes in several shards
PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
DIALOGUE = [1, 5, 9, by_hand.IMAGE, 12, 7, 300, 4]


def read(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def released(tmp_path: Path, vocabulary: int = 320, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    model = save_llava(tmp_path / "ShareGPT4V-7B", llava_tensors(vocabulary, dtype))
    return model, save_tower(tmp_path / "tower", tower_tensors())


def load(folder: Path) -> LlavaForConditionalGeneration:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.inference_mode()
def logits(folder: Path, dialogue: list[int], image: int) -> Tensor:
    """With the image's 4 tokens in place of its mark."""
    ids = [new for old in dialogue for new in ([image] * 4 if old == by_hand.IMAGE else [old])]
    output: Tensor = load(folder)(input_ids=torch.tensor([ids]), pixel_values=PIXELS).logits[0]
    return output


def test_converted_model_computes_what_the_released_tensors_do(tmp_path: Path) -> None:
    model, tower = released(tmp_path, vocabulary=32000)
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", SHARD)
    expected = by_hand.llava_logits(llava_tensors(32000), tower_tensors(), DIALOGUE, PIXELS)
    ours = logits(tmp_path / "out", DIALOGUE, image=32000)
    assert ours.shape == (len(DIALOGUE) + 3, 32064)
    # Measured: 3e-6 at logits of up to 4.
    torch.testing.assert_close(ours[:, :32000], expected, atol=2e-5, rtol=0)


def test_rows_without_a_token_give_the_mean_logit_and_so_never_win(tmp_path: Path) -> None:
    model, tower = released(tmp_path)
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", SHARD)
    ours = logits(tmp_path / "out", DIALOGUE, image=320)
    assert ours.shape[1] == 384  # 322 to a multiple of 64
    torch.testing.assert_close(ours[:, 320:], ours[:, :320].mean(1, keepdim=True).expand(-1, 64))
    assert int(ours.argmax(1).max()) < 320


def test_output_has_the_names_that_vllm_and_older_versions_read(tmp_path: Path) -> None:
    model, tower = released(tmp_path)
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", SHARD)
    names = set(read(tmp_path / "out"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names
    assert len(set(index["weight_map"].values())) > 2
    assert {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.2.self_attn.out_proj.bias",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    } <= names
    roots = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.")
    assert all(name.startswith(roots) for name in names)
    assert len(names) == len(llava_tensors()) + len(tower_tensors()) - 3  # two inv_freq, one position_ids


@pytest.mark.parametrize("kind", ["bin", "safetensors", "tower inside"])
def test_every_kind_of_release_gives_the_same_tensors(kind: str, tmp_path: Path) -> None:
    model, tower = released(tmp_path)
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "expected", SHARD)
    if kind == "safetensors":
        save_safetensors(model, llava_tensors())
        save_safetensors(tower, tower_tensors())
    elif kind == "tower inside":
        inside = {f"model.vision_tower.vision_tower.{name}": t for name, t in tower_tensors().items()}
        save_llava(model, llava_tensors() | inside)
    convert(plan_conversion(model, vision_tower=None if "inside" in kind else tower), tmp_path / "out", SHARD)
    expected, got = read(tmp_path / "expected"), read(tmp_path / "out")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_tower_inside_has_heads_as_wide_as_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {f"model.vision_tower.vision_tower.{name}": t for name, t in tower_tensors().items()}
    convert(plan_conversion(save_llava(tmp_path / "x", llava_tensors() | inside)), tmp_path / "out", SHARD)
    monkeypatch.setitem(TOWER, "heads", TOWER["width"] // 64)
    expected = by_hand.llava_logits(llava_tensors(), tower_tensors(), DIALOGUE, PIXELS)
    ours = logits(tmp_path / "out", DIALOGUE, image=320)[:, :320]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_tower_of_a_whole_clip_model_is_taken_without_its_text_half(tmp_path: Path) -> None:
    model, tower = released(tmp_path)
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
    text = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.tensor(4.6)}
    torch.save(tower_tensors() | text, tower / "pytorch_model.bin")
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", SHARD)
    load(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_there_and_back_again_every_bit_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tower = released(tmp_path, dtype=dtype)
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", SHARD)
    convert(plan_conversion(tmp_path / "out", to="released"), tmp_path / "back", SHARD)
    for folder, tensors in (
        (tmp_path / "back", llava_tensors(dtype=dtype)),
        (tmp_path / "back/vision_tower", tower_tensors()),
    ):
        got = read(folder)
        kept = {n: t for n, t in tensors.items() if "inv_freq" not in n and "position_ids" not in n}
        assert got.keys() == kept.keys()
        assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in kept.items())
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    # And what came back converts again, to the same file bytes.
    again = plan_conversion(tmp_path / "back", vision_tower=tmp_path / "back/vision_tower")
    convert(again, tmp_path / "again", SHARD)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_model_of_our_own_goes_to_the_released_layout_with_a_config_that_leads_back(tmp_path: Path) -> None:
    model, tower = released(tmp_path)
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", SHARD)
    trained = load(tmp_path / "out")
    trained.save_pretrained(tmp_path / "trained")  # as a training run does: no released files beside it
    (tmp_path / "trained/tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    convert(plan_conversion(tmp_path / "trained", to="released"), tmp_path / "back", SHARD)
    convert(
        plan_conversion(tmp_path / "back", vision_tower=tmp_path / "back/vision_tower"),
        tmp_path / "again",
        SHARD,
    )
    expected = by_hand.llava_logits(llava_tensors(), tower_tensors(), DIALOGUE, PIXELS)
    ours = logits(tmp_path / "again", DIALOGUE, image=320)[:, :320]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_names_of_transformers_5_become_those_that_vllm_reads(tmp_path: Path) -> None:
    toy = save_random_lmm(tmp_path / "toy")
    written = read(toy)
    assert not any(name.startswith("vision_tower.vision_model.") for name in written)  # else nothing to do
    convert(plan_conversion(toy), tmp_path / "out", SHARD)
    names = set(read(tmp_path / "out"))
    assert len(names) == len(written)
    assert all(
        name.startswith(("vision_tower.vision_model.", "multi_modal_projector.", "language_model."))
        for name in names
    )
    before, after = load(toy).state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert load_adapter(tmp_path / "out").protocol == "squash"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    model, tower = released(folder)
    convert(plan_conversion(model, vision_tower=tower), folder / "out", SHARD)
    return folder / "out"


def test_parts_name_no_dtype_of_their_own(tmp_path: Path) -> None:
    """transformers 4 would load the vision tower of a half-precision model in the float32 of its training."""
    toy = save_random_lmm(tmp_path / "toy")
    content = json.loads((toy / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        content[part]["dtype"] = "float32"
    (toy / "config.json").write_text(json.dumps(content))
    convert(plan_conversion(toy), tmp_path / "out", SHARD)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "dtype" in content
    assert not any("dtype" in part for part in content.values() if isinstance(part, dict))


def test_tokenizer_gives_what_generate_takes(converted: Path) -> None:
    """transformers 4 adds token_type_ids where a tokenizer's folder does not say what the model takes."""
    content = json.loads((converted / "tokenizer_config.json").read_text())
    assert content["model_input_names"] == ["input_ids", "attention_mask"]


def test_folder_holds_all_that_others_need(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["image_token_index"], config["image_seq_length"]) == (320, 4)
    assert config["text_config"]["rope_theta"] == 50000.0  # for readers older than transformers 5
    assert config["image_protocol"] == "pad"
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 321, "do_sample": False}
    preprocessor = json.loads((converted / "preprocessor_config.json").read_text())
    assert preprocessor["do_pad"] is True
    assert preprocessor["size"] == {"shortest_edge": 28}
    assert preprocessor["crop_size"] == {"height": 28, "width": 28}
    card = (converted / "README.md").read_text()
    assert "`<image>` = 320, `<pad>` = 321" in card
    assert "parameters in" in card
    assert "transformers 4.49 or newer" in card
    assert "with torchvision some differ by up to 0.03" in card


def test_chat_template_and_processor_give_the_ids_of_our_own_prompt(converted: Path) -> None:
    adapter = load_adapter(converted)
    blank = np.zeros((28, 28, 3), np.uint8)
    ids = adapter.template.prompt([Turn("user", "ab tata?", (blank,))])
    processor = AutoProcessor.from_pretrained(converted)
    content = [{"type": "text", "text": "ab tata?"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.startswith("<s>A chat between a curious user")
    assert text.endswith("user's questions. USER: <image>\nab tata? ASSISTANT:")
    image = Image.new("RGB", (40, 28), (200, 10, 10))
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"][0].tolist() == ids
    assert ids.count(320) == 4


def test_code_on_the_card_runs(
    converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(converted)
    Image.new("RGB", (40, 28), (200, 10, 10)).save("photo.jpg")
    code = (converted / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("=200", "=3"), names)
    assert "USER:" in capsys.readouterr().out
    assert names["inputs"]["input_ids"][0].tolist().count(1) == 1  # one BOS


def test_later_rounds_follow_vicuna_v1(converted: Path) -> None:
    processor = AutoProcessor.from_pretrained(converted)
    dialogue = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    text = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    assert text.endswith(" USER: one ASSISTANT: two</s>USER: three ASSISTANT:")


@pytest.mark.parametrize("protocol", ["pad", "crop", "squash"])
def test_processor_prepares_images_as_our_pipeline_does(protocol: ImageProtocol, tmp_path: Path) -> None:
    model, tower = released(tmp_path)
    planned = plan_conversion(model, vision_tower=tower)
    config = json.loads((model / "config.json").read_text())
    if protocol == "crop":
        (model / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": None}))
        planned = plan_conversion(model, vision_tower=tower)
    if protocol == "squash":
        planned = plan_conversion(save_random_lmm(tmp_path / "toy"))
    convert(planned, tmp_path / "out", SHARD)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((110, 70), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.png")
    theirs = AutoProcessor.from_pretrained(tmp_path / "out").image_processor(photo, return_tensors="pt")
    adapter = load_adapter(tmp_path / "out")
    assert adapter.protocol == protocol
    ours = prepare((tmp_path / "photo.png").read_bytes(), adapter.image_size, protocol).pixels
    # Measured: 0 with Pillow, 0.03 with torchvision: two steps of 1/255, as it rounds otherwise.
    assert (theirs["pixel_values"] - adapter.normalise(ours[None])).abs().max() < 0.031
