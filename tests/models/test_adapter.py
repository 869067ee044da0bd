"""What the engine relies on: images embedded in their places, pixels normalised, weights loaded strictly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import CLIP_MEAN, CLIP_STD, Adapter, LmmAdapter
from sharegpt4v.models.load import lmm_template, load_adapter
from sharegpt4v.models.toy import ANSWER_END, EOS, IMAGE
from sharegpt4v.templates import Plain, VicunaV1
from tests.models.random_weights import save_random_captioner, save_random_lmm


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def captioner(captioner_folder: Path) -> Adapter:
    return load_adapter(captioner_folder)


@pytest.fixture(scope="module")
def v1_captioner(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return load_adapter(save_random_captioner(tmp_path_factory.mktemp("v1"), sampler="qformer"))


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> LmmAdapter:
    adapter = load_adapter(save_random_lmm(tmp_path_factory.mktemp("lmm")))
    assert isinstance(adapter, LmmAdapter)
    return adapter


def pixels(images: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (images, 48, 48, 3), dtype=np.uint8)


def question(text: str = "What is this?", images: int = 1, key: str = "r") -> Request:
    return Request(key, (Turn("user", text, tuple(pixels(images))),))


def ids_around_image(adapter: Adapter, text: str) -> tuple[list[int], list[int]]:
    before, after = adapter.template.segments(question(text).turns)
    return before, after


@pytest.mark.parametrize(("family", "image_tokens"), [("captioner", 36), ("v1_captioner", 38), ("lmm", 36)])
def test_prompt_embeddings_hold_text_then_image_then_text(
    family: str, image_tokens: int, request: pytest.FixtureRequest
) -> None:
    adapter: Adapter = request.getfixturevalue(family)
    before, after = ids_around_image(adapter, "What is this?")
    requests = [Request("r", (Turn("user", "What is this?", (image,)),)) for image in pixels(3)]
    embeddings = torch.stack(adapter.embed(requests))
    assert embeddings.shape == (3, len(before) + image_tokens + len(after), 128)
    table = adapter.language_model.get_input_embeddings().weight
    assert torch.equal(embeddings[2, : len(before)], table[before])
    assert torch.equal(embeddings[2, -len(after) :], table[after])
    image = embeddings[:, len(before) : -len(after)]
    with torch.inference_mode():
        torch.testing.assert_close(image, adapter.image_features(adapter.normalise(pixels(3))))


def test_lmm_logits_equal_vanilla_llava(lmm: LmmAdapter) -> None:
    ids = torch.tensor([lmm.template.prompt(question().turns)])
    with torch.inference_mode():
        vanilla = lmm.model(input_ids=ids, pixel_values=lmm.normalise(pixels(1))).logits
        [prompt] = lmm.embed([question()])
        torch.testing.assert_close(lmm.language_model(inputs_embeds=prompt[None]).logits, vanilla)


def test_pixels_are_normalised_as_clip_does(captioner: Adapter) -> None:
    image = pixels(1)
    expected = (image[0, 5, 7] / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(captioner.normalise(image)[0, :, 5, 7], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((32, 48, 3), np.uint8), r"uint8 \(32, 48, 3\)"),
        (np.zeros((48, 48, 3), np.float32), "float32"),
        (np.zeros((1, 48, 48, 3), np.uint8), r"\(1, 48, 48, 3\)"),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused(
    captioner: Adapter, image: np.ndarray[tuple[int, ...], np.dtype[Any]], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        captioner.embed([Request("r", (Turn("user", "What is this?", (image,)),))])


def test_images_stand_in_the_turns_that_bring_them(lmm: LmmAdapter) -> None:
    first, second, third = pixels(3)
    turns = (
        Turn("user", "What are these?", (first, second)),
        Turn("assistant", "Cats."),
        Turn("user", "And that?", (third,)),
    )
    [prompt] = lmm.embed([Request("r", turns)])
    assert len(prompt) == lmm.prompt_tokens(turns)
    places = torch.tensor(lmm.template.prompt(turns)) == lmm.template.image_token_id
    with torch.inference_mode():
        features = lmm.image_features(lmm.normalise(np.stack([first, second, third])))
    torch.testing.assert_close(prompt[places], features.flatten(0, 1))


def test_a_text_only_dialogue_runs_no_vision_tower(lmm: LmmAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmm, "image_features", None)
    [prompt] = lmm.embed([question(images=0)])
    [ids] = lmm.template.segments([Turn("user", "What is this?")])
    assert lmm.tokenizer.decode(ids).endswith("USER: What is this? ASSISTANT:")
    assert prompt.shape == (len(ids), 128)


def test_roles_out_of_order_are_refused(lmm: LmmAdapter) -> None:
    request = Request("r", (Turn("assistant", "Hello."),))
    with pytest.raises(UserError, match="roles are assistant"):
        lmm.embed([request])


def test_image_tokens_and_features_that_differ_are_named_with_both_counts(
    lmm: LmmAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmm.template, "image_tokens", 35)
    with pytest.raises(UserError, match="35 image tokens .* 36 features"):
        lmm.embed([question()])


def test_families_differ_in_end_tokens_and_protocol(captioner: Adapter, lmm: Adapter) -> None:
    assert captioner.eos_token_ids == {EOS, ANSWER_END}
    assert lmm.eos_token_ids == {EOS}
    assert captioner.image_size == lmm.image_size == 48
    assert captioner.protocol == "squash"


def test_weights_are_cast_to_the_dtype_asked_for(captioner_folder: Path) -> None:
    adapter = load_adapter(captioner_folder, dtype=torch.bfloat16)
    assert adapter.embed([question()])[0].dtype == torch.bfloat16


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        load_adapter(tmp_path)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert' model; we can run share_captioner and llava"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_wrong_tensors_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    folder = save_random_captioner(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors["resampler.query"]
    elif fault == "unexpected":
        tensors["resampler.query.old"] = torch.zeros(1)
    else:
        tensors["resampler.query"] = torch.zeros(9, 128)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 {fault} keys, .*resampler.query"):
        load_adapter(folder)


def test_tokenizer_without_the_control_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_random_captioner(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_7>")
        json.loads(text)
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"tokenizer of {folder} has no <TOKENS_UNUSED_0>"):
        load_adapter(folder)


def test_a_chat_model_can_be_trained_in_another_template(lmm: LmmAdapter) -> None:
    template = lmm_template(lmm.tokenizer, lmm.model.config, "plain")
    assert isinstance(template, Plain) and isinstance(lmm.template, VicunaV1)
    assert (template.image_token_id, template.image_tokens) == (IMAGE, 36)
