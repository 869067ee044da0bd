"""`sharegpt4v caption --engine vllm` with a family that vLLM asks by its chat template, through Ray."""

from pathlib import Path

from sharegpt4v.toy.images import write_images
from tests.commands import rows, sharegpt4v
from tests.engine.requests import needs_vllm
from tests.models.tiny_vlms import save_qwen


@needs_vllm
def test_images_of_any_shape_are_captioned_and_a_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    model, world = save_qwen(tmp_path / "qwen"), tmp_path / "world"
    write_images(world, 6)
    flags = ["--engine", "vllm", "--model", str(model), "--images", str(world), "--batch-size", "3"]
    # The model's answers are random tokens.
    flags += ["--decoding.max-new-tokens", "20", "--gate.min-characters", "0", "--gate.script", "any"]
    flags += ["--max-pixels", "50000", "--max-reject-rate", "1", "--actors", "1"]
    for more in (["--limit", "3"], []):
        done = sharegpt4v("caption", *flags, "--out", str(tmp_path / "resumed"), *more, timeout=240)
        assert done.returncode == 0, done.stderr
    assert sharegpt4v("caption", *flags, "--out", str(tmp_path / "whole"), timeout=240).returncode == 0
    for kind in ("captions", "rejects"):
        resumed, whole = (rows(tmp_path / name, kind).to_pylist() for name in ("resumed", "whole"))
        assert resumed == whole
    captions, rejects = (rows(tmp_path / "whole", kind).to_pylist() for kind in ("captions", "rejects"))
    assert len(captions) + len(rejects) == 6 and len(captions) > 0
    assert any(max(row["width"], row["height"]) > 1_000 for row in captions)
