"""Questions about scenes with their one true answer each, and dialogues of them as LLaVA's files have them.

Kinds: existence, count, colour, position, words. Answers are a word or a place, so equality judges them.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharegpt4v.toy.captions import brief_caption, detailed_caption, name_of
from sharegpt4v.toy.scene import Scene
from sharegpt4v.toy.sources import COLOURS, COUNTS, PLACES, SHAPES, WORDS

KINDS = ("existence", "count", "colour", "position", "words")

DETAILED = "Describe the image in detail."
BRIEF = "Describe the image in one sentence."
"""Questions that are answered by the two captions of a scene."""


_DRAWN = 4
"""How often a dialogue draws the questions of a scene: about eleven rounds."""


@dataclass(frozen=True, slots=True)
class Question:
    """kind: of KINDS. answer: the only right one."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Returns the questions of a scene, one of each kind that it has something for, in an order of its own.

    The same scene and seed give the same questions.
    """
    draw = random.Random(f"{seed}:{scene.source}:{scene.path}")
    made = [
        _existence(scene, draw),
        Question("count", "How many shapes are there?", COUNTS[len(scene.objects)]),
    ]
    shapes = [thing.shape for thing in scene.objects]
    alone = [thing for thing in scene.objects if shapes.count(thing.shape) == 1]
    if alone:
        thing = draw.choice(alone)
        made.append(Question("colour", f"What colour is the {thing.shape}?", thing.colour))
    if scene.objects:
        thing = draw.choice(scene.objects)
        made.append(Question("position", f"Where is the {name_of(thing)}?", PLACES[thing.cell]))
    if scene.words:
        made.append(Question("words", "What does the sign say?", scene.words[0].text))
    draw.shuffle(made)
    return made


def _existence(scene: Scene, draw: random.Random) -> Question:
    """Asks for an object that is there, or, as often, for one that is not."""
    there = [name_of(thing) for thing in scene.objects]
    everything = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    absent = [name for name in everything if name not in there]
    ask_for_one = bool(there) and draw.random() < 0.5
    name = draw.choice(there if ask_for_one else absent)
    return Question("existence", f"Is there a {name}?", "yes" if ask_for_one else "no")


def wordings() -> Iterator[str]:
    """Yields texts that hold every word of every question and answer, for the tokenizer's vocabulary."""
    yield from (BRIEF, DETAILED, "How many shapes are there?", "What does the sign say?")
    yield from (f"{asked} is the {shape}?" for asked in ("What colour", "Where") for shape in SHAPES)
    yield from (f"Is there a {colour}" for colour in COLOURS)
    yield from ("yes", "no", *COUNTS, *COLOURS, *PLACES, *WORDS)


def asked_often(scene: Scene, times: int) -> list[tuple[str, str]]:
    """Returns questions and answers of a scene, drawn several times: about other objects, and none twice."""
    drawn = [question for seed in range(times) for question in questions(scene, seed)]
    return list(dict.fromkeys((question.text, question.answer) for question in drawn))


def dialogue(scene: Scene, *, with_caption: bool = True) -> dict[str, Any]:
    """Returns a conversation of a LLaVA file: questions about a scene, with its caption at the end."""
    rounds = asked_often(scene, _DRAWN)
    if with_caption:
        rounds.append((DETAILED, detailed_caption(scene)))
    turns: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(rounds):
        mark = "" if number else "<image>\n"
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": scene.path, "image": scene.path, "source": scene.source, "conversations": turns}


def short_caption(scene: Scene) -> dict[str, Any]:
    """Returns a conversation of the alignment set: the brief caption."""
    turns = [{"from": "human", "value": f"<image>\n{BRIEF}"}, {"from": "gpt", "value": brief_caption(scene)}]
    return {"id": scene.path, "image": scene.path, "source": scene.source, "conversations": turns}


def detailed(scene: Scene) -> dict[str, Any]:
    """Returns a conversation of the captioner's set: the detailed caption."""
    turns = [
        {"from": "human", "value": f"<image>\n{DETAILED}"},
        {"from": "gpt", "value": detailed_caption(scene)},
    ]
    return {"id": scene.path, "image": scene.path, "source": scene.source, "conversations": turns}


CONVERSATIONS: Mapping[str, Callable[[Scene], dict[str, Any]]] = {
    "detailed": detailed,
    "short": short_caption,
    "questions": dialogue,
}
"""What training takes of a scene: for the captioner and pre-training, for alignment, for SFT."""


def score(answers: Sequence[tuple[Question, str]]) -> dict[str, float]:
    """Returns the share of right answers by kind, and `all`; an end stop and letter case do not count."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question, said in answers:
        right[question.kind].append(said.strip().rstrip(".").lower() == question.answer.lower())
    shares = {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}
    hits = [hit for each in right.values() for hit in each]
    return shares | {"all": sum(hits) / max(1, len(hits))}
