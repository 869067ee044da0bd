"""`sharegpt4v caption --engine transformers`: whole images, the gate and a resume, through Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharegpt4v.toy.images import write_images
from tests.commands import rows
from tests.models.tiny_vlms import save_toy_llava

_LONGEST_REFUSED = 90
"""Characters: some captions of the toy model are shorter, and the retry may find longer ones."""


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, caption_there: Callable[..., Any]) -> None:
    model, world = save_toy_llava(tmp_path / "chat"), tmp_path / "world"
    write_images(world, 8)
    (world / "coco" / "cut.jpg").write_bytes(next(world.rglob("*.jpg")).read_bytes()[:500])
    flags = ("--engine", "transformers", "--model", model, "--images", world, "--batch-size", "3")
    gate = ("--gate.min-characters", str(_LONGEST_REFUSED), "--actors", "1")

    for more in (("--limit", "5"), ()):
        done = caption_there(*flags, *gate, "--out", tmp_path / "resumed", *more)
        assert done.returncode == 0, done.stderr
    assert "5 of 9 images are done" in done.stderr
    assert caption_there(*flags, *gate, "--out", tmp_path / "whole").returncode == 0

    kinds = ("captions", "rejects")
    captions, rejects = (rows(tmp_path / "resumed", kind).to_pylist() for kind in kinds)
    assert [captions, rejects] == [rows(tmp_path / "whole", kind).to_pylist() for kind in kinds]
    assert len(captions) + len(rejects) == 9
    assert {row["reason"] for row in rejects} == {"truncated", "too_short"}
    assert all(len(row["caption"]) >= _LONGEST_REFUSED for row in captions)
    assert any(max(row["width"], row["height"]) > 1_000 for row in captions)  # whatever its shape

    changed = caption_there(*flags, *gate, "--out", tmp_path / "whole", "--max-pixels", "5000")
    assert changed.returncode == 2 and "max-pixels" in changed.stderr
