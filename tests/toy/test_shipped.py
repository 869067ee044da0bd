"""The shipped toy weights: small, whole, and true about scenes they have never seen."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.captions import detailed_caption
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.shipped import SHIPPED, TOY_MODELS, make_and_judge, make_weights, write_as_converted
from sharegpt4v.toy.sources import SOURCES
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.toy.train import (
    UNSEEN_WORLD,
    Scenes,
    TrainingRecipe,
    exact_match,
    learning_rate_share,
)

WORLD = 77  # neither the world that was trained on nor the one that training watched
SCENES = 100


@cache
def shipped(name: str) -> Adapter:
    return load_adapter(SHIPPED / name)


def unseen(world: int = WORLD, difficulty: int = 1) -> list[Scene]:
    names = tuple(SOURCES)
    return [make_scene(world, i, source=names[i % len(names)], difficulty=difficulty) for i in range(SCENES)]


def greedy_captions(adapter: Adapter, prompt: str, scenes: list[Scene]) -> list[str]:
    size = (adapter.image_size, adapter.image_size)
    pixels = np.stack([np.array(render(scene, size)) for scene in scenes])
    requests = [Request("scene", (Turn("user", prompt, (image,)),)) for image in pixels]
    embeddings = torch.stack(adapter.embed(requests))
    ids = adapter.language_model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=100,
        do_sample=False,
        eos_token_id=sorted(adapter.eos_token_ids),
        pad_token_id=adapter.tokenizer.pad_token_id,
    )
    return [text.strip() for text in adapter.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize(("name", "share"), [("captioner", 0.9), ("lmm", 0.8)])
def test_most_captions_of_unseen_scenes_are_exactly_true(name: str, share: float) -> None:
    """Of 500 other scenes the shipped files measured more; see benchmarks/README.md."""
    scenes = unseen()
    captions = greedy_captions(shipped(name), TOY_MODELS[name].prompt, scenes)
    right = [caption == detailed_caption(scene) for caption, scene in zip(captions, scenes, strict=True)]
    assert sum(right) >= share * SCENES


def test_share_from_one_pass_equals_the_share_of_greedy_captions() -> None:
    adapter, prompt = shipped("captioner"), TOY_MODELS["captioner"].prompt
    scenes = unseen(UNSEEN_WORLD, difficulty=2)
    captions = greedy_captions(adapter, prompt, scenes)
    right = [caption == detailed_caption(scene) for caption, scene in zip(captions, scenes, strict=True)]
    assert exact_match(adapter, prompt, SCENES, difficulty=2) == pytest.approx(sum(right) / SCENES)


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
def test_shipped_tokenizer_is_the_one_the_code_builds(name: str) -> None:
    assert shipped(name).tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_shipped_folders_weigh_eight_megabytes_at_most() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8_000_000


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
def test_shipped_folder_has_one_weight_file_and_what_other_tools_look_for(name: str) -> None:
    files = {path.name for path in (SHIPPED / name).iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert [file for file in files if file.endswith(".safetensors")] == ["model.safetensors"]


def test_chat_model_is_shipped_as_convert_would_write_it(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "lmm", tmp_path / "lmm")
    write_as_converted(tmp_path / "lmm")
    files = {path.name: path.read_bytes() for path in (SHIPPED / "lmm").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "lmm").iterdir()} == files


def test_chat_model_loads_with_what_others_load_it_with() -> None:
    """vLLM asks AutoProcessor; transformers 4 knows the vision tower by these names alone."""
    processor = AutoProcessor.from_pretrained(SHIPPED / "lmm")
    content = [{"type": "image"}, {"type": "text", "text": "Analyze"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = render(make_scene(WORLD, 3, source="coco"), (640, 480))
    inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    adapter = shipped("lmm")
    blank = np.zeros((48, 48, 3), np.uint8)
    assert inputs["input_ids"][0].tolist() == adapter.template.prompt([Turn("user", "Analyze", (blank,))])
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    with safe_open(SHIPPED / "lmm" / "model.safetensors", "pt") as weights:
        assert "vision_tower.vision_model.embeddings.class_embedding" in weights.keys()


def test_samples_are_scenes_with_their_captions_in_the_adapters_template() -> None:
    adapter = shipped("captioner")
    sample = Scenes(adapter, "Analyze", 5, WORLD, (1,), per_batch=5)[3]
    scene = make_scene(WORLD, 3, source=tuple(SOURCES)[3])
    [image] = sample.images
    assert np.array_equal(image, np.array(render(scene, (48, 48))))
    turns = (Turn("user", "Analyze", (image,)), Turn("assistant", detailed_caption(scene)))
    assert sample.ids == adapter.template.example(turns)


def test_difficulty_changes_from_batch_to_batch_and_not_within() -> None:
    scenes = Scenes(shipped("captioner"), "Analyze", 40, WORLD, (1, 3), per_batch=10)
    lengths = [len(scenes[i].ids.labels) for i in range(40)]
    assert min(lengths[10:20]) > max(lengths[0:10])
    assert min(lengths[30:40]) > max(lengths[20:30])


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    recipe = TrainingRecipe(steps=1000, warmup=100)
    assert learning_rate_share(0, recipe) == pytest.approx(0.01)
    assert learning_rate_share(100, recipe) == pytest.approx(1)
    assert learning_rate_share(550, recipe) == pytest.approx(0.5)
    assert learning_rate_share(1000, recipe) == pytest.approx(0)


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
def test_same_seed_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    stages = (TrainingRecipe(steps=2, batch_size=5), TrainingRecipe(steps=1, seed=1, batch_size=5))
    for folder in ("one", "two"):
        for _ in make_weights(name, tmp_path / folder, stages):
            pass
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_no_steps_are_refused() -> None:
    with pytest.raises(UserError, match="^steps: 0 is too few: give 1 or more"):
        make_and_judge("captioner", steps=0)
