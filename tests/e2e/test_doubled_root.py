"""A --root that ends with the first folder of every path: the commonest mistake with the released lists."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import rows, write_images

FAKE = ("--engine", "fake", "--fake.image-side", "24")
Caption = Callable[..., "subprocess.CompletedProcess[str]"]


def _listed(folder: Path, count: int) -> Path:
    names = [f"coco/{number:03}.jpg" for number in range(count)]
    write_images(folder, names)
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps({"id": name, "image": name}) + "\n" for name in names))
    return path


def test_a_doubled_root_is_no_success_and_is_mended_by_the_right_one(
    caption_there: Caption, tmp_path: Path
) -> None:
    arguments = ("--images", _listed(tmp_path, 12), "--out", tmp_path / "run", *FAKE)
    done = caption_there(*arguments, "--root", tmp_path / "coco")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "no caption was written: all 12 images were rejected, mostly as missing; no _SUCCESS" in line
    assert "put --root (or the images) right and run again with --retry-rejects" in line
    assert not (tmp_path / "run" / "_SUCCESS").exists()
    assert rows(tmp_path / "run", "rejects")["reason"].to_pylist() == ["missing"] * 12

    done = caption_there(*arguments, "--root", tmp_path, "--retry-rejects")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run", "captions")) == 12 and (tmp_path / "run" / "_SUCCESS").exists()


@pytest.mark.parametrize(("there", "succeeds"), [(11, False), (57, True)])
def test_from_fifty_images_on_the_share_that_is_missing_decides(
    caption_there: Caption, tmp_path: Path, there: int, succeeds: bool
) -> None:
    """Far over the limit a run is stopped, on the way or at its end; 3 of 60 are 5 %, the limit itself."""
    listed = _listed(tmp_path, 60)
    write_images(tmp_path / "coco", [f"coco/{number:03}.jpg" for number in range(there)])
    done = caption_there("--images", listed, "--out", tmp_path / "run", *FAKE, "--root", tmp_path / "coco")
    assert done.returncode == (0 if succeeds else 1), done.stderr
    assert (tmp_path / "run" / "_SUCCESS").exists() is succeeds
    if not succeeds:
        line = done.stderr.splitlines()[-1]
        assert "images were rejected" in line and "mostly as missing" in line and "put --root" in line
