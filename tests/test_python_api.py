"""The models in a notebook: any kind of image, one or many, and nothing heavy until it is asked for."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sharegpt4v import Captioner, Chat
from sharegpt4v.dialogue import SamplingParams
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.toy.captions import detailed_caption
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene


@pytest.fixture(scope="module")
def captioner() -> Iterator[Captioner]:
    with Captioner.load("toy", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def scene() -> tuple[Image.Image, str]:
    """A picture whose caption the toy captioner knows."""
    truth = make_scene(0, 1, source="coco")
    return render(truth), detailed_caption(truth)


def test_a_picture_is_captioned_whatever_holds_it(
    captioner: Captioner, scene: tuple[Image.Image, str], tmp_path: Path
) -> None:
    image, caption = scene
    path = tmp_path / "bïld 1.png"
    image.save(path)
    for form in (image, path, str(path), path.read_bytes()):
        assert captioner.caption(form) == caption


def test_many_are_captioned_together_and_a_broken_one_costs_only_itself(
    captioner: Captioner, scene: tuple[Image.Image, str], caplog: pytest.LogCaptureFixture
) -> None:
    image, caption = scene
    assert captioner.caption([image, b"no image", image]) == [caption, None, caption]
    assert "image 1 has no caption: not_an_image" in caplog.text


def test_a_single_broken_image_says_why(captioner: Captioner, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="missing"):
        captioner.caption(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("make", [bytearray, memoryview, io.BytesIO, list, lambda _: None, lambda _: 3])
def test_an_object_that_is_no_image_is_one_line_and_not_captioned_item_by_item(
    captioner: Captioner, make: Callable[[bytes], Any]
) -> None:
    with pytest.raises(UserError, match="images: an image is a Pillow image, a path or bytes, not"):
        captioner.caption(make(b"\x00\n\x00\n"))


def test_an_array_is_refused_with_the_way_to_make_an_image_of_it(captioner: Captioner) -> None:
    with pytest.raises(UserError, match=r"not ndarray; PIL\.Image\.fromarray"):
        captioner.caption(np.zeros((40, 30, 3), np.uint8))


def test_a_path_with_a_nul_character_is_missing(captioner: Captioner) -> None:
    assert captioner.caption(["a\0b.jpg"]) == [None]


def test_what_was_begun_is_cancelled_when_a_later_image_raises(
    captioner: Captioner, scene: tuple[Image.Image, str]
) -> None:
    def images() -> Iterator[Image.Image]:
        yield from [scene[0]] * 64
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captioner.caption(images(), min_new_tokens=400)
    started = time.monotonic()
    assert captioner.caption(scene[0]) == scene[1]
    assert time.monotonic() - started < 2  # 64 captions of 400 tokens take longer


def test_a_forked_process_is_refused_instead_of_waiting_for_ever(captioner: Captioner) -> None:
    child = os.fork()
    if child == 0:
        try:
            captioner.caption(Image.new("RGB", (8, 8)))
        except UserError as error:
            os._exit(7 if "load it in this process" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_rotated_photograph_is_turned_upright_also_as_a_pillow_image(
    captioner: Captioner, scene: tuple[Image.Image, str]
) -> None:
    image, caption = scene
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    assert captioner.caption(Image.open(buffer)) == caption


def test_sampling_is_bounded_and_applied(captioner: Captioner, scene: tuple[Image.Image, str]) -> None:
    assert len(captioner.caption(scene[0], max_new_tokens=3).split()) <= 3
    with pytest.raises(UserError, match="top_p"):
        captioner.caption(scene[0], top_p=0.0)


def test_a_dialogue_grows_with_each_answer_and_not_with_a_failed_question(
    scene: tuple[Image.Image, str],
) -> None:
    with Chat.load("toy", threads=1) as chat:
        first = chat.ask("What is in this photo?", scene[0], max_new_tokens=8)
        assert first and [turn.role for turn in chat.turns] == ["user", "assistant"]
        pieces = list(chat.stream("And now?", max_new_tokens=4))
        assert chat.turns[-1].text == "".join(pieces)
        with pytest.raises(Rejected):
            chat.ask("And this?", b"no image")
        stream = chat.stream("Left early?", max_new_tokens=200)
        next(stream)
        stream.close()
        assert len(chat.turns) == 4
        chat.reset()
        assert chat.turns == []


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json"):
        Captioner.load(tmp_path / "nowhere")


def test_importing_the_package_and_its_names_loads_no_torch() -> None:
    code = "import sys; from sharegpt4v import Captioner, Chat; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert SamplingParams().max_new_tokens == 500  # the captioner's default, as the release has it


def test_python_ends_normally_while_a_model_is_open_and_answers() -> None:
    code = (
        "from sharegpt4v import Chat; chat = Chat.load('toy', threads=1)\n"
        "pieces = chat.stream('What is in this photo?', max_new_tokens=500); next(pieces)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
