"""Toy images on disk: real files, the same bytes from the same seed, the truth beside them."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from sharegpt4v.errors import UserError
from sharegpt4v.toy.__main__ import main
from sharegpt4v.toy.captions import detailed_caption
from sharegpt4v.toy.images import write_images
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.sources import SOURCES
from sharegpt4v.toy.truth import TRUTH_FILE


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_byte_identical_files_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("one", 4), ("same", 4), ("other", 5)):
        write_images(tmp_path / name, 10, seed=seed)
    one, same, other = (digests(tmp_path / name) for name in ("one", "same", "other"))
    assert len(one) == 11
    assert one == same
    assert not set(one.values()) & set(other.values())


def test_files_are_what_their_names_say_and_the_truth_beside_them_is_complete(tmp_path: Path) -> None:
    write_images(tmp_path, 10, seed=6, difficulty=2)
    records = [json.loads(line) for line in (tmp_path / TRUTH_FILE).read_text().splitlines()]
    assert [record["source"] for record in records] == list(SOURCES) * 2
    for index, record in enumerate(records):
        scene = Scene.from_json(record["scene"])
        assert scene == make_scene(6, index, source=record["source"], difficulty=2)
        assert record["caption"] == detailed_caption(scene)
        with Image.open(tmp_path / record["image"]) as image:
            assert image.format == ("PNG" if record["image"].endswith(".png") else "JPEG")
            assert image.size == (scene.width, scene.height)


def test_paths_mimic_the_released_roots(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    assert set(digests(tmp_path)) == {
        "coco/train2017/000000000000.jpg",
        "sam/images/sa_1.jpg",
        "share_textvqa/images/00000002.jpg",
        "web-landmark/images/00003.jpg",
        "wikiart/images/00004.png",
        TRUTH_FILE,
    }


def test_only_the_sources_asked_for_are_written(tmp_path: Path) -> None:
    write_images(tmp_path, 3, sources=["coco"])
    assert {Path(name).parts[0] for name in digests(tmp_path)} == {"coco", TRUTH_FILE}


def test_no_images_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^count: 0 is too few: give 1 or more"):
        write_images(tmp_path, 0)


def test_the_command_writes_images_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["images", "--out", str(tmp_path), "--count", "2", "--seed", "1", "--difficulty", "3"]) == 0
    assert capsys.readouterr().out == f"2 images and their truth: {tmp_path / TRUTH_FILE}\n"
    assert len(digests(tmp_path)) == 3


def test_the_command_ends_with_one_line_and_code_2_for_a_wrong_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["images", "--out", str(tmp_path), "--count", "0"]) == 2
    assert capsys.readouterr().err == "toy images: --count: 0 is too few: give 1 or more\n"
