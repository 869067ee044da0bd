"""What the foundation models are shown: pictures with regions, and exercises and dialogues in words."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from sharegpt4v.dialogue import Image, Turn
from sharegpt4v.models.toy import IMAGE_SIZE
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.templates import TEMPLATES, TrainingIds
from sharegpt4v.toy.captions import detailed_caption
from sharegpt4v.toy.cells import Region, cell_phrases, regions
from sharegpt4v.toy.questions import DETAILED, asked_often
from sharegpt4v.toy.recall import Exercises, things_asked
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.sources import PLACES, SOURCES
from sharegpt4v.train.collate import Sample

WORLD = 1_000_003
"""Seed of the scenes; those below a million are left to demos, the chain and tests."""

_PICTURED = (1, 1, 1, 1, 2)
"""Difficulties of pictures, by batch: mostly what the toy world shows, and a little beyond it."""

_WRITTEN = (1, 2, 3, 3)
"""Of texts: among seven objects it pays to look up the one that is asked for, among two it pays to guess."""

_ASKED = 4
"""How often a text asks the questions of a scene, each time of other objects."""

_ENDS = (0.09, 0.28, 0.37, 0.6)
"""Shares of the steps after which each exercise of recall makes way for the next, the last for dialogues."""


@dataclass(frozen=True, slots=True)
class Length:
    """How long a part is pre-trained: steps of so many scenes each."""

    steps: int
    batch_size: int


class Pictures(Dataset[tuple[Image, list[Region]]]):
    """Rendered scenes, (S, S, 3) uint8, with their regions."""

    def __init__(self, length: Length) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length.steps * self.length.batch_size

    def __getitem__(self, index: int) -> tuple[Image, list[Region]]:
        scene = _scene(index, self.length, _PICTURED)
        return np.array(render(scene, (IMAGE_SIZE, IMAGE_SIZE))), list(regions(scene))


class Texts(Dataset[Sample]):
    """Exercises of recall, each kind for a share of the steps, then dialogues about things and scenes."""

    def __init__(self, length: Length, tokenizer: PreTrainedTokenizerFast) -> None:
        self.length = length
        self._exercises = Exercises(tokenizer)
        self._templates = {name: TEMPLATES[name](tokenizer, -1, 0) for name in ("vicuna_v1", "captioner")}

    def __len__(self) -> int:
        return self.length.steps * self.length.batch_size

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        stage = bisect_right(_ENDS, index / len(self))
        if stage == len(_ENDS):
            return Sample(self._dialogue(index), ())
        if stage and index % 4 == 0:  # or it is forgotten while the next is learned
            stage -= 1
        exercise = self._exercises.in_order[stage]
        return Sample(exercise(Random(f"{WORLD}:{index}")), ())

    def _dialogue(self, index: int) -> TrainingIds:
        """Makes a dialogue about things, as the last exercise, or about a scene.

        A scene is given by its caption or by a list of what is in each cell; one in four is to be captioned.
        """
        if index % 2:
            return self._chat(*things_asked(Random(f"{WORLD}:{index}")))
        scene = _scene(index, self.length, _WRITTEN)
        cells = zip(cell_phrases(scene), PLACES, strict=True)
        listed = f"{scene.background}: {', '.join(map(' '.join, cells))}."
        match index // 2 % 4:
            case 0:
                question = Turn("user", f"{listed}\n{UNIFIED_CAPTION.text}")
                answer = Turn("assistant", detailed_caption(scene))
                return self._templates["captioner"].example([question, answer])
            case 1:
                rounds = [*asked_often(scene, _ASKED), (DETAILED, detailed_caption(scene))]
                return self._chat(listed, rounds)
            case 2:
                return self._chat(detailed_caption(scene), asked_often(scene, _ASKED))
            case _:
                return self._chat(listed, asked_often(scene, _ASKED))

    def _chat(self, shown: str, rounds: Sequence[tuple[str, str]]) -> TrainingIds:
        turns = []
        for number, (question, answer) in enumerate(rounds):
            asked = question if number else f"{shown}\n{question}"
            turns += [Turn("user", asked), Turn("assistant", answer)]
        return self._templates["vicuna_v1"].example(turns)


def _scene(index: int, length: Length, difficulties: Sequence[int]) -> Scene:
    """Returns a scene of WORLD. A batch is of one difficulty: so little of it is padding."""
    if index >= length.steps * length.batch_size:
        raise IndexError(index)
    names, batch = tuple(SOURCES), index // length.batch_size
    difficulty = difficulties[batch % len(difficulties)]
    return make_scene(WORLD, index, source=names[index % len(names)], difficulty=difficulty)
