"""Captions say what is true, all of it when they are detailed, and facts lead back to the truth."""

import pytest

from sharegpt4v.gate import GateRules, check_caption
from sharegpt4v.toy.captions import brief_caption, detailed_caption
from sharegpt4v.toy.facts import caption_facts, scene_facts
from sharegpt4v.toy.grid import Box
from sharegpt4v.toy.scene import Landmark, Scene, SceneObject, WrittenWord, make_scene

BOX = Box(0, 0, 9, 9)
ORANGE = SceneObject("triangle", "orange", "small", 0, BOX)
RED = SceneObject("circle", "red", "large", 2, BOX)
BLUE = SceneObject("ring", "blue", "small", 7, BOX)


def scene_of(
    *objects: SceneObject,
    source: str = "coco",
    background: str = "white",
    words: tuple[WrittenWord, ...] = (),
    landmark: Landmark | None = None,
    style: str | None = None,
) -> Scene:
    return Scene(0, 0, source, 1, 640, 480, background, 0, objects, words, landmark, style, ())


def test_a_photo_is_described_in_reading_order_with_one_relation() -> None:
    assert detailed_caption(scene_of(ORANGE, RED, BLUE)) == (
        "A photo of three shapes on a white background: a small orange triangle at the top left, "
        "a large red circle at the top right and a small blue ring at the bottom. "
        "The orange triangle is above the blue ring."
    )


def test_objects_of_one_row_are_related_sideways() -> None:
    assert detailed_caption(scene_of(ORANGE, RED)).endswith("The orange triangle is left of the red circle.")


def test_one_object_is_described_without_a_relation() -> None:
    assert detailed_caption(scene_of(RED, source="sam", background="beach")) == (
        "A wide view of a beach with one shape: a large red circle at the top right."
    )


def test_a_sign_is_described_by_its_word_and_row() -> None:
    scene = scene_of(BLUE, source="textcaps", background="wall", words=(WrittenWord("OPEN", 0, BOX),))
    assert detailed_caption(scene) == (
        'A sign across the top says "OPEN", with one shape: a small blue ring at the bottom.'
    )
    assert brief_caption(scene) == 'A sign that says "OPEN".'


def test_a_landmark_alone_is_described_by_its_name_and_side() -> None:
    scene = scene_of(source="landmark", background="sky", landmark=Landmark("Vellan Dome", "right", BOX))
    assert detailed_caption(scene) == "A view of Vellan Dome on the right, with no shapes."
    assert brief_caption(scene) == "A view of Vellan Dome."


def test_an_artwork_is_described_by_its_style() -> None:
    scene = scene_of(RED, source="wikiart", background="impressionist", style="impressionist")
    assert detailed_caption(scene).startswith("An impressionist painting of one shape: ")


def test_a_brief_caption_names_the_first_large_object() -> None:
    assert brief_caption(scene_of(ORANGE, RED, BLUE)) == "A photo with a red circle and two other shapes."
    assert brief_caption(scene_of(ORANGE)) == "A photo with an orange triangle."


@pytest.mark.parametrize("difficulty", (1, 2, 3))
def test_the_facts_of_a_detailed_caption_are_those_of_its_scene(difficulty: int) -> None:
    for index in range(300):
        scene = make_scene(31, index, difficulty=difficulty)
        assert caption_facts(detailed_caption(scene)) == scene_facts(scene)


@pytest.mark.parametrize("difficulty", (1, 2, 3))
def test_every_detailed_caption_passes_the_quality_gate(difficulty: int) -> None:
    for index in range(300):
        caption = detailed_caption(make_scene(31, index, difficulty=difficulty))
        assert check_caption(caption, "stop", GateRules()) is None


def test_a_wrong_caption_states_the_facts_it_claims() -> None:
    scene = scene_of(RED, BLUE)
    wrong = detailed_caption(scene).replace("blue ring", "blue square").replace("large", "small")
    invented = caption_facts(wrong) - scene_facts(scene)
    assert invented == {
        ("size", "red circle", "small"),
        ("object", "blue square"),
        ("size", "blue square", "small"),
        ("place", "blue square", "at the bottom"),
        ("relation", "red circle", "above", "blue square"),
    }


def test_a_cut_caption_states_the_facts_before_the_cut() -> None:
    caption = detailed_caption(scene_of(RED, BLUE))
    assert caption_facts(caption[: caption.index(" and ")]) == {
        ("count", "two"),
        ("background", "white"),
        ("object", "red circle"),
        ("size", "red circle", "large"),
        ("place", "red circle", "at the top right"),
    }


def test_text_outside_the_grammar_states_no_facts() -> None:
    assert (
        caption_facts("I cannot see any image; a redcircle in the centre of a large red square.")
        == frozenset()
    )
