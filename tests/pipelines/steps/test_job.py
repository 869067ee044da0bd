"""What a configuration comes to before anything starts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pipelines.steps.job import CaptionJob, make_job
from sharegpt4v.checkpoints.card import TOY_CAPTIONER, read_card
from sharegpt4v.config.caption import CaptionConfig, Decoding
from sharegpt4v.dialogue import WholeImages
from sharegpt4v.engine import dtype
from sharegpt4v.errors import UserError
from sharegpt4v.run.folder import RunFolder
from sharegpt4v.run.settings import write_settings
from sharegpt4v.toy.images import write_images
from tests.models.tiny_vlms import save_toy_llava


def _job(folder: Path, decoding: Decoding) -> CaptionJob:
    return make_job(CaptionConfig(images="photos", out=folder, decoding=decoding))


def test_the_first_try_and_the_retry_are_bounded_alike(tmp_path: Path) -> None:
    rules = _job(tmp_path, Decoding(min_new_tokens=20, max_new_tokens=30)).rules
    for sampling in (rules.sampling, rules.retry):
        assert (sampling.min_new_tokens, sampling.max_new_tokens) == (20, 30)


@pytest.fixture
def toy_world(tmp_path: Path) -> Path:
    write_images(tmp_path / "toy", 1)
    return tmp_path / "toy"


def test_toy_captions_of_anything_but_the_toy_world_are_warned_of(tmp_path: Path, toy_world: Path) -> None:
    job = _job(tmp_path, Decoding())
    assert job.toy_warning(str(toy_world)) is None
    for root in (str(tmp_path), "s3://bucket/photos"):
        warning = job.toy_warning(root)
        assert warning is not None and warning.startswith("warning: the toy captioner")
        assert "--model" in warning
    (tmp_path / "truth.jsonl").write_text('{"image": "a.jpg"}\n')  # somebody else's file of this name
    assert job.toy_warning(str(tmp_path)) is not None


def test_the_fake_engine_is_warned_of_in_the_toy_world_too(toy_world: Path) -> None:
    job = make_job(CaptionConfig(images="x", out=Path("run"), engine="fake"))
    assert job.toy_warning(str(toy_world)) == (
        "warning: the fake engine looks at no image: its captions describe nothing"
    )


def test_a_real_captioner_is_not_warned_of(tmp_path: Path) -> None:
    shutil.copytree(TOY_CAPTIONER, tmp_path / "share-captioner")
    job = make_job(CaptionConfig(images="x", out=tmp_path / "run", model=str(tmp_path / "share-captioner")))
    assert job.toy_warning(str(tmp_path)) is None


def test_the_toy_is_sent_by_its_name_because_each_node_has_it_elsewhere(tmp_path: Path) -> None:
    assert make_job(CaptionConfig(images="x", out=tmp_path / "run")).spec.weights == "toy"


def test_auto_is_resolved_by_the_driver_and_kept_by_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype, "_TOY_BYTES", 1_000_000)  # the shipped model is no toy
    config = CaptionConfig(images="x", out=tmp_path / "run")

    def made(flags: str, **changed: Any) -> tuple[str, str]:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "cpuinfo")
        job = make_job(config.model_copy(update=changed))
        return job.spec.dtype, job.fingerprint["dtype"]

    assert made("avx512f") == ("float32", "float32")
    assert made("amx_tile amx_bf16") == ("bfloat16", "bfloat16")
    run = RunFolder.open(tmp_path / "run")
    write_settings(run, {}, make_job(config).fingerprint, {})
    assert made("avx512f") == ("bfloat16", "bfloat16")
    assert made("avx512f", dtype="float32") == ("float32", "float32")  # which the resume then refuses


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return save_toy_llava(tmp_path / "llava")


def _transformers_job(tmp_path: Path, model: Path, **more: Any) -> CaptionJob:
    config = CaptionConfig(images="x", out=tmp_path / "run", model=str(model), engine="transformers", **more)
    return make_job(config)


def test_what_whole_images_are_bounded_by_is_part_of_the_fingerprint(tmp_path: Path, llava: Path) -> None:
    job = _transformers_job(tmp_path, llava)
    assert job.images == WholeImages(1 << 20) and job.fingerprint["max_pixels"] == 1 << 20
    assert not {"protocol", "image_size"} & job.fingerprint.keys()
    assert _transformers_job(tmp_path, llava, max_pixels=5_000).images == WholeImages(5_000)


def test_a_field_that_the_engine_cannot_follow_is_refused(tmp_path: Path, llava: Path) -> None:
    with pytest.raises(UserError, match="^protocol: pad is refused: the model's own processor"):
        _transformers_job(tmp_path, llava, protocol="pad")
    with pytest.raises(UserError, match="^max_pixels: 5,000 is refused: the torch engine"):
        make_job(CaptionConfig(images="x", out=tmp_path / "run", max_pixels=5_000))


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _without_processor(folder: Path) -> None:
    for path in folder.glob("*processor_config.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_template, "has no chat template, by which the transformers engine makes prompts"),
        (_without_processor, "a 'llava' model without processor_config.json or preprocessor_config.json"),
    ],
)
def test_a_model_that_transformers_cannot_prompt_is_refused_before_an_actor_starts(
    tmp_path: Path, llava: Path, change: Callable[[Path], None], reason: str
) -> None:
    change(llava)
    with pytest.raises(UserError, match=reason):
        _transformers_job(tmp_path, llava)


def test_share_captioner_is_none_of_transformers_models(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="a Share-Captioner, which transformers does not know: `engine` torch"
    ):
        _transformers_job(tmp_path, TOY_CAPTIONER)


def test_another_chat_template_is_another_model_of_the_transformers_engine(
    tmp_path: Path, llava: Path
) -> None:
    before = _transformers_job(tmp_path, llava).spec.model
    native = read_card(str(llava)).digest
    (llava / "chat_template.jinja").write_text("{{ messages }}")
    assert _transformers_job(tmp_path, llava).spec.model != before
    assert read_card(str(llava)).digest == native  # the torch engine does not read it


def test_a_name_of_the_hub_is_no_relative_path_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.session.inside_job", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="org/none is no folder here and not in Hugging Face's cache"):
        make_job(CaptionConfig(images="/x", out=Path("/run"), model="org/none"))
