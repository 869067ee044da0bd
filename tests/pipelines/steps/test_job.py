"""What a configuration comes to before anything starts."""

import shutil
from pathlib import Path

import pytest

from pipelines.steps.job import CaptionJob, make_job
from sharegpt4v.checkpoints.card import TOY_CAPTIONER
from sharegpt4v.config.caption import CaptionConfig, Decoding
from sharegpt4v.toy.images import write_images


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
