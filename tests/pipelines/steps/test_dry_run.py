"""A dry run looks at what the run needs, says what it found, and leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipelines.steps import dry_run
from pipelines.steps.dry_run import describe_job
from pipelines.steps.job import make_job
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.checkpoints.card import TOY_CAPTIONER
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import UserError
from sharegpt4v.run.settings import write_settings
from tests.captions.sessions import begin, caption, commit
from tests.commands import environment, write_images
from tests.models.tiny_vlms import save_qwen


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", [*(f"coco/{n}.jpg" for n in range(5)), "sam/0.jpg", "sam/1.jpg"])
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


def _config(images: str | Path, out: Path, **more: Any) -> CaptionConfig:
    return CaptionConfig(**{"images": str(images), "out": out, "engine": "fake"} | more)


def test_images_are_counted_and_tried_and_nothing_is_written(images: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    lines = describe_job(_config(images, tmp_path / "run")).splitlines()
    assert lines[:2] == [
        f"# 7 images in {images}: 5 coco, 2 sam; passed over: 1 .txt files",
        "# tried 5 of them, the first of each source: 5 can be decoded",
    ]
    assert lines[-1] == f"# begins a new run in {tmp_path / 'run'}"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_cannot_be_read_is_named(images: Path, tmp_path: Path) -> None:
    (images / "sam" / "0.jpg").write_text("<html>not found</html>")
    (images / "coco" / "4.jpg").write_bytes(b"")  # one that is not tried
    said = describe_job(_config(images, tmp_path / "run"))
    assert "the first of each source: 4 can be decoded; the first that cannot is 'sam/0.jpg': " in said


def test_a_root_below_which_no_image_can_be_read_is_refused(images: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.jsonl"
    manifest.write_text('{"image": "0.jpg"}\n{"image": "1.jpg"}\n')
    with pytest.raises(UserError, match=r"none of 2 images .* below .*images can be read.*'0.jpg'.*--root"):
        describe_job(_config(manifest, tmp_path / "run", root=str(images)))
    assert "2 can be decoded" in describe_job(_config(manifest, tmp_path / "run", root=str(images / "coco")))


def test_the_model_is_found_with_its_size_and_dtypes(images: Path, tmp_path: Path) -> None:
    said = describe_job(_config(images, tmp_path / "run", engine="torch", dtype="bfloat16"))
    size = sum(path.stat().st_size for path in TOY_CAPTIONER.glob("*.safetensors")) / 1e6
    assert "# model toy-captioner@" in said
    stored = float(said.partition("weights: ")[2].partition(" MB stored in float16, run in bfloat16")[0])
    assert "\n# warning: the toy captioner knows the coloured shapes of the toy world alone" in said
    assert 0.9 * size < stored <= size + 0.1


def test_weights_that_are_none_are_refused(images: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TOY_CAPTIONER, model)
    for path in model.glob("*.safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")  # a checkout without its large files
    with pytest.raises(UserError, match="is no safetensors file: copy or convert the weights again"):
        describe_job(_config(images, tmp_path / "run", engine="torch", model=str(model)))


def test_gpus_are_counted_where_some_are_asked_for(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(images, tmp_path / "run", gpus_per_actor=1, cpus_per_actor=1)
    monkeypatch.setattr(dry_run, "_local_gpus", lambda: 0)
    with pytest.raises(UserError, match="1 actors of 1 GPUs need 1, this machine has 0: .*--address"):
        describe_job(config)
    monkeypatch.setattr(dry_run, "_local_gpus", lambda: 2)
    assert "# engine fake on 2 workers of this machine, 1 GPUs each; it has 2" in describe_job(config)


def test_of_a_cluster_nothing_is_claimed(images: Path, tmp_path: Path) -> None:
    said = describe_job(_config(images, tmp_path / "run", gpus_per_actor=1, address="head:6379"))
    assert "# engine fake on the cluster at head:6379, which is not looked at" in said


def test_without_gpus_no_torch_is_imported(images: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipelines.steps.dry_run import describe_job\n"
        "from sharegpt4v.config.caption import CaptionConfig\n"
        f"print(describe_job(CaptionConfig(images={str(images)!r}, out=Path({str(tmp_path / 'run')!r}))))\n"
        "assert 'torch' not in sys.modules"
    )
    said = subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True)
    assert "# engine torch on 1 worker of this machine, without GPUs" in said


def _begun(config: CaptionConfig, *ids: str) -> CaptionRun:
    """A run of these ids that has one outcome."""
    run = begin(config.out, [*ids])
    (run.path / "lock.json").touch()
    write_settings(run, config.model_dump(mode="json"), make_job(config).fingerprint, {"root": config.images})
    commit(run, 0, "x", caption(run, ids[0]))
    return run


def test_a_resume_is_counted_with_the_images_that_would_join(images: Path, tmp_path: Path) -> None:
    config = _config(images, tmp_path / "run", limit=100)
    run = _begun(config, "gone")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    said = describe_job(config)
    assert said.endswith(f"# resumes {run.path}: 1 of 8 images are done")
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_resume_that_would_be_refused_is_refused(images: Path, tmp_path: Path) -> None:
    config = _config(images, tmp_path / "run")
    _begun(config, "coco/0.jpg")  # there with another path
    with pytest.raises(UserError, match="another image or source"):
        describe_job(config)


def test_what_a_try_without_an_outcome_left_is_no_resume(images: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", ["coco/0.jpg"])
    (run.path / "lock.json").touch()
    assert f"# begins a new run in {run.path}" in describe_job(_config(images, run.path))
    assert len(run.shards()) == 1


def test_a_folder_that_holds_other_files_is_refused(images: Path) -> None:
    with pytest.raises(UserError, match="holds other files"):
        describe_job(_config(images, images))


def test_a_model_for_the_transformers_engine_is_looked_at_with_its_processor(
    images: Path, tmp_path: Path
) -> None:
    model = save_qwen(tmp_path / "qwen")
    config = _config(images, tmp_path / "run", engine="transformers", model=str(model))
    assert ", images of 1,048,576 pixels at most; weights: 0.8 MB" in describe_job(config)
    if find_spec("torchvision"):
        return
    settings = model / "preprocessor_config.json"
    fields = json.loads(settings.read_text()) | {"image_processor_type": "Lfm2VlImageProcessor"}
    settings.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="only torchvision can process their images"):
        describe_job(config)
