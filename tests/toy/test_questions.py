"""Questions about toy scenes: one true answer each, every kind, and dialogues that training takes."""

import json
from collections import Counter
from pathlib import Path

from sharegpt4v.errors import Rejected
from sharegpt4v.toy.__main__ import main
from sharegpt4v.toy.captions import name_of
from sharegpt4v.toy.questions import DETAILED, KINDS, dialogue, questions, score, short_caption
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.sources import COUNTS, PLACES, SOURCES
from sharegpt4v.train.conversations import read_conversation

SCENES = [make_scene(9, n, source=tuple(SOURCES)[n % len(SOURCES)], difficulty=1 + n % 2) for n in range(200)]


def test_every_answer_is_true_of_its_scene() -> None:
    for scene in SCENES:
        names = {name_of(thing) for thing in scene.objects}
        for question in questions(scene):
            assert _holds(scene, names, question.kind, question.text, question.answer), question


def _holds(scene: Scene, names: set[str], kind: str, text: str, answer: str) -> bool:
    last = text.rstrip("?").split(" ")
    if kind == "existence":
        return (" ".join(last[-2:]) in names) == (answer == "yes")
    if kind == "count":
        return COUNTS.index(answer) == len(scene.objects)
    if kind == "colour":
        return [thing.colour for thing in scene.objects if thing.shape == last[-1]] == [answer]
    if kind == "position":
        return [PLACES[t.cell] for t in scene.objects if name_of(t) == " ".join(last[-2:])] == [answer]
    return answer in {word.text for word in scene.words}


def test_all_kinds_are_asked_and_yes_is_as_frequent_as_no() -> None:
    asked = [question for scene in SCENES for question in questions(scene)]
    assert set(Counter(question.kind for question in asked)) == set(KINDS)
    answers = Counter(question.answer for question in asked if question.kind == "existence")
    assert 0.4 < answers["yes"] / sum(answers.values()) < 0.6


def test_the_same_scene_and_seed_give_the_same_questions() -> None:
    assert questions(SCENES[3]) == questions(SCENES[3])
    assert any(questions(scene, 1) != questions(scene, 2) for scene in SCENES[:10])


def test_dialogues_are_conversations_that_training_takes() -> None:
    for scene in SCENES[:20]:
        talk = read_conversation(dialogue(scene)["conversations"], with_image=True)
        assert talk.image_turn == 0 and talk.texts[-2] == DETAILED and talk.repaired is None
        try:
            read_conversation(short_caption(scene)["conversations"], with_image=True)
        except Rejected as error:
            raise AssertionError(error) from None


def test_the_command_writes_conversations_about_the_images_of_the_same_world(tmp_path: Path) -> None:
    assert main(["images", "--out", str(tmp_path / "images"), "--count", "5", "--seed", "4"]) == 0
    assert main(["dialogues", "--out", str(tmp_path / "talk.json"), "--count", "5", "--seed", "4"]) == 0
    talk = json.loads((tmp_path / "talk.json").read_text())
    truth = [json.loads(line) for line in (tmp_path / "images" / "truth.jsonl").read_text().splitlines()]
    assert [row["id"] for row in talk] == [row["id"] for row in truth]
    assert [row["conversations"][-1]["value"] for row in talk] == [row["caption"] for row in truth]
    assert all((tmp_path / "images" / row["image"]).exists() for row in talk)


def test_answers_are_scored_by_kind() -> None:
    [question] = [q for q in questions(SCENES[0]) if q.kind == "count"]
    shares = score([(question, f" {question.answer.upper()}. "), (question, "a lot")])
    assert shares == {"count": 0.5, "all": 0.5}
