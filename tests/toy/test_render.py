"""Pixels agree with the truth, at full size and at a model's size."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from sharegpt4v.toy.grid import Box
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.toy.sources import LANDMARKS, SOURCES, WORDS


@pytest.mark.parametrize("source", SOURCES)
def test_a_scene_is_rendered_at_its_own_size_in_rgb(source: str) -> None:
    scene = make_scene(0, 0, source=source)
    image = render(scene)
    assert (image.size, image.mode) == ((scene.width, scene.height), "RGB")


@pytest.mark.parametrize("difficulty", (1, 2, 3))
@pytest.mark.parametrize("source", SOURCES)
def test_a_small_render_looks_like_the_full_image_squashed(source: str, difficulty: int) -> None:
    # Measured over 180 scenes: a mean of 0.2 to 2.6 of 255, signs worst, and 2.6 times as much at least
    # once the picture is moved by one pixel.
    for index in range(3):
        scene = make_scene(21, index, source=source, difficulty=difficulty)
        small = np.asarray(render(scene, (48, 48)), dtype=np.int16)
        squashed = np.asarray(render(scene).resize((48, 48), Image.Resampling.BICUBIC), dtype=np.int16)
        difference = np.abs(small - squashed)[1:-1, 1:-1].mean()
        moved = [np.abs(np.roll(small, step, axis) - squashed) for step in (-1, 1) for axis in (0, 1)]
        assert difference < 3
        assert 2 * difference < min(picture[1:-1, 1:-1].mean() for picture in moved)


@pytest.mark.parametrize("source", SOURCES)
def test_an_object_changes_the_pixels_of_its_box_and_of_its_shadow_only(source: str) -> None:
    scene = next(s for i in range(99) if (s := make_scene(5, i, source=source)).objects)
    thing = scene.objects[0]
    changed = ImageChops.difference(
        render(scene), render(replace(scene, objects=scene.objects[1:]))
    ).getbbox()
    assert changed is not None
    shadow = 0 if scene.style else round(0.05 * (thing.box.x1 - thing.box.x0))
    slack = 0.03 * (thing.box.x1 - thing.box.x0) + 2
    expected = Box(thing.box.x0, thing.box.y0, thing.box.x1 + shadow, thing.box.y1 + shadow)
    assert np.abs(np.subtract(changed, expected)).max() <= slack


def test_a_word_changes_the_pixels_of_its_sign_only() -> None:
    scene = make_scene(5, 1, source="textcaps")
    changed = ImageChops.difference(render(scene), render(replace(scene, words=()))).getbbox()
    assert changed is not None
    assert np.abs(np.subtract(changed, scene.words[0].box)).max() <= 1


def test_every_two_words_and_every_two_landmarks_look_different_at_48_pixels() -> None:
    signed, famous = make_scene(5, 1, source="textcaps"), make_scene(5, 1, source="landmark")
    assert famous.landmark
    families = (
        [replace(signed, words=(replace(signed.words[0], text=text),)) for text in WORDS],
        [replace(famous, landmark=replace(famous.landmark, name=name)) for name in LANDMARKS],
    )
    for scenes in families:
        pixels = [np.asarray(render(scene, (48, 48)), dtype=np.int16) for scene in scenes]
        for i, one in enumerate(pixels):
            for other in pixels[i + 1 :]:
                # Twenty pixels, each by a quarter of the range at least: not one anti-aliased edge.
                assert (np.abs(one - other).max(axis=-1) > 64).sum() > 20


def test_rendering_twice_gives_the_same_bytes() -> None:
    for source in SOURCES:
        scene = make_scene(3, 2, source=source, difficulty=3)
        assert render(scene, (64, 64)).tobytes() == render(scene, (64, 64)).tobytes()
