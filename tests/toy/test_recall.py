"""Exercises of recall: what has a label can be known from the text before it, and nothing else has one."""

from random import Random

import pytest

from sharegpt4v.templates import IGNORE_INDEX, TrainingIds
from sharegpt4v.toy.recall import Exercises
from sharegpt4v.toy.shown import Length, Texts
from sharegpt4v.toy.sources import COLOURS, PLACES, SHAPES
from sharegpt4v.toy.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
EXERCISES = Exercises(TOKENIZER)


def _words(ids: TrainingIds) -> list[tuple[str, bool]]:
    """The words of an exercise, each with whether it is labelled, without the start token."""
    assert ids.input_ids[0] == TOKENIZER.bos_token_id and ids.labels[0] == IGNORE_INDEX
    for token, label in zip(ids.input_ids, ids.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
    words = [TOKENIZER.decode([token]).strip() for token in ids.input_ids[1:]]
    return list(zip(words, (label != IGNORE_INDEX for label in ids.labels[1:]), strict=True))


def _groups(ids: TrainingIds) -> list[list[tuple[str, bool]]]:
    groups: list[list[tuple[str, bool]]] = [[]]
    for word, labelled in _words(ids):
        if word == ",":
            groups.append([])
        else:
            groups[-1].append((word, labelled))
    return groups[:-1]


@pytest.mark.parametrize("seed", range(20))
def test_copying_repeats_the_first_word_of_each_group(seed: int) -> None:
    groups = _groups(EXERCISES.copying(Random(seed)))
    assert len({len(group) for group in groups}) == 1 and len(groups) > 15
    for group in groups:
        assert group[-1] == (group[0][0], True) and not any(labelled for _, labelled in group[:-1])


@pytest.mark.parametrize("seed", range(20))
def test_lookups_are_labelled_from_the_second_time_on_and_agree_with_the_first(seed: int) -> None:
    known: dict[tuple[str, ...], str] = {}
    labelled = 0
    for group in _groups(EXERCISES.lookup(Random(seed))):
        (*key, (value, asked)) = group
        words = tuple(word for word, _ in key)
        assert asked == (words in known) and not any(mark for _, mark in key)
        assert known.setdefault(words, value) == value
        labelled += asked
    assert labelled >= len(known) and len(set(known.values())) == len(known)


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_true_of_the_list(seed: int) -> None:
    ids = EXERCISES.answering(Random(seed))
    text = TOKENIZER.decode(ids.input_ids[1:])
    listed, _, asked = text.rpartition(",")
    things = {}
    for entry in listed.split(","):
        _, colour, shape, place = entry.split(maxsplit=3)
        assert colour in COLOURS and shape in SHAPES and place in PLACES
        things[colour, shape] = place
    answers = TOKENIZER.decode([label for label in ids.labels if label != IGNORE_INDEX])
    said = []
    for question, answer in _rounds(asked):
        said.append(answer)
        name = tuple(question.split()[-2:])
        if question.startswith("Where"):
            assert things[name] == answer
        elif question.startswith("Is"):
            assert (name in things) == (answer == "yes")
        else:
            assert [colour for colour, shape in things if shape == name[1]] == [answer]
    assert " ".join(said) == answers.strip() and len(said) == 6


def _rounds(text: str) -> list[tuple[str, str]]:
    rounds = []
    starts = ("Where", "Is", "What")
    words = text.split()
    while words:
        end = next(n for n, word in enumerate(words) if word.endswith("?"))
        stop = next((n for n in range(end, len(words)) if words[n] in starts), len(words))
        rounds.append((" ".join(words[: end + 1]).rstrip("?"), " ".join(words[end + 1 : stop])))
        words = words[stop:]
    return rounds


def test_texts_begin_with_exercises_and_end_with_dialogues() -> None:
    texts = Texts(Length(100, 8), TOKENIZER)
    first, last = (TOKENIZER.decode(texts[index].ids.input_ids) for index in (0, len(texts) - 1))
    assert "USER" not in first and "USER: " in last
    with pytest.raises(IndexError):
        texts[len(texts)]
