"""Scenes are whole, true to themselves, and the same every time."""

import json
from itertools import combinations

import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.toy.grid import Box
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.sources import OBJECTS_BY_DIFFICULTY, SOURCES

DIFFICULTIES = sorted(OBJECTS_BY_DIFFICULTY)


def some_scenes(difficulty: int, count: int = 200) -> list[Scene]:
    return [make_scene(11, index, difficulty=difficulty) for index in range(count)]


def overlap(one: Box, other: Box) -> bool:
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


def middle(box: Box) -> tuple[float, float]:
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_same_seed_and_index_give_the_same_scene(difficulty: int) -> None:
    assert some_scenes(difficulty) == some_scenes(difficulty)


def test_another_seed_or_index_gives_another_scene() -> None:
    assert len({make_scene(seed, index) for seed in range(4) for index in range(50)}) == 200


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_scene_survives_a_trip_through_json_text(difficulty: int) -> None:
    for scene in some_scenes(difficulty):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_a_source_that_is_asked_for_is_given_and_all_are_drawn_otherwise() -> None:
    assert {scene.source for scene in some_scenes(1)} == set(SOURCES)
    for name in SOURCES:
        assert make_scene(0, 0, source=name).source == name


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'imagenet' is not one of coco, sam"):
        make_scene(0, 0, source="imagenet")


def test_an_unknown_difficulty_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"difficulty 4 is not one of \[1, 2, 3\]"):
        make_scene(0, 0, difficulty=4)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_number_of_objects_grows_with_the_difficulty(difficulty: int) -> None:
    fewest, most = OBJECTS_BY_DIFFICULTY[difficulty]
    counts = {len(scene.objects) for scene in some_scenes(difficulty) if scene.source == "coco"}
    assert counts == set(range(fewest, most + 1))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_colour_and_shape_name_one_object_of_a_scene(difficulty: int) -> None:
    for scene in some_scenes(difficulty):
        assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize("difficulty", (1, 2))
def test_nothing_overlaps_below_difficulty_three(difficulty: int) -> None:
    for scene in some_scenes(difficulty):
        boxes = [thing.box for thing in scene.objects] + [word.box for word in scene.words]
        boxes += [scene.landmark.box] if scene.landmark else []
        assert not any(overlap(one, other) for one, other in combinations(boxes, 2)), scene


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_box_lies_in_the_image_and_its_middle_in_its_cell(difficulty: int) -> None:
    for scene in some_scenes(difficulty):
        margin = SOURCES[scene.source].margin
        for thing in scene.objects:
            assert 0 <= thing.box.x0 < thing.box.x1 <= scene.width
            assert 0 <= thing.box.y0 < thing.box.y1 <= scene.height
            x, y = middle(thing.box)
            column = int((x / scene.width - margin) / (1 - 2 * margin) * 3)
            row = int((y / scene.height - margin) / (1 - 2 * margin) * 3)
            assert thing.cell == 3 * row + column


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_large_objects_are_larger_than_small_ones_of_the_same_scene(difficulty: int) -> None:
    for scene in some_scenes(difficulty):
        sides = {
            size: [t.box.x1 - t.box.x0 for t in scene.objects if t.size == size]
            for size in ("small", "large")
        }
        assert max(sides["small"], default=0) < min(sides["large"], default=9999)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_relations_hold_between_the_boxes(difficulty: int) -> None:
    for scene in some_scenes(difficulty):
        for first, predicate, second in scene.relations():
            (x, y), (other_x, other_y) = (middle(scene.objects[i].box) for i in (first, second))
            assert {"above": y < other_y, "left of": x < other_x, "right of": x > other_x}[predicate]


def test_any_two_objects_are_related() -> None:
    for scene in some_scenes(2):
        pairs = {(relation.subject, relation.object) for relation in scene.relations()}
        assert pairs == set(combinations(range(len(scene.objects)), 2))


def test_counts_add_up_to_the_objects() -> None:
    for scene in some_scenes(2):
        for attribute in ("shape", "colour", "size"):
            counts = scene.counts(attribute)
            assert sum(counts.values()) == len(scene.objects)
            assert all(n == sum(getattr(t, attribute) == v for t in scene.objects) for v, n in counts.items())


def test_only_the_hardest_scenes_are_cluttered() -> None:
    assert not any(scene.clutter for difficulty in (1, 2) for scene in some_scenes(difficulty))
    assert all(scene.clutter for scene in some_scenes(3))
