"""Captions that repeat each other: which are found, which are not, and that the work stays bounded."""

import random
from collections.abc import Sequence

import pyarrow as pa
import pytest

from sharegpt4v.captions import near_duplicates
from sharegpt4v.captions.near_duplicates import NearDuplicates, Repeats
from sharegpt4v.captions.words import tokenise

VOCABULARY = [f"word{n}" for n in range(5_000)]


def _texts(count: int, words: int = 80, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(VOCABULARY, k=words)) for _ in range(count)]


def _changed(text: str, words: int, seed: int = 1) -> str:
    """The text with that many words replaced."""
    chance, parts = random.Random(seed), text.split()
    for place in chance.sample(range(len(parts)), words):
        parts[place] = chance.choice(VOCABULARY)
    return " ".join(parts)


def _found(captions: Sequence[str], count: int = 8, batch: int = 1_000) -> Repeats:
    duplicates = NearDuplicates()
    for start in range(0, len(captions), batch):
        duplicates.add(tokenise(pa.array(captions[start : start + batch], pa.string())))
    return duplicates.groups(count)


@pytest.mark.parametrize("captions", [[], [""], ["one caption alone in its run"], _texts(500)])
def test_captions_of_their_own_are_in_no_group(captions: list[str]) -> None:
    assert _found(captions) == Repeats(len(captions), 0, 0, [])


def test_equal_words_are_found_whatever_their_case_and_marks() -> None:
    other = _texts(20)
    found = _found([*other[:5], "A red bus.", *other[5:], "a RED bus", "A red -- bus!"], batch=4)

    assert (found.repeated, found.groups) == (3, 1)
    assert found.largest[0].same and found.largest[0].members == [5, 21, 22]


def test_a_few_changed_words_make_near_duplicates() -> None:
    texts = _texts(300, words=150)
    found = _found([*texts, *(_changed(text, 1, seed) for seed, text in enumerate(texts))])

    assert found.groups >= 0.97 * 300 and found.repeated == 2 * found.groups
    assert not found.largest[0].same
    assert all(later - first == 300 for first, later in (group.members for group in found.largest))


def test_captions_that_share_half_of_their_words_are_none() -> None:
    texts = _texts(300, words=150)
    found = _found([*texts, *(_changed(text, 40, seed) for seed, text in enumerate(texts))])

    assert found.repeated == 0


def test_the_same_beginning_makes_no_near_duplicates() -> None:
    start = "in the center of the image there is a large and colourful "
    assert _found([start + text for text in _texts(300)]).repeated == 0


def test_short_captions_repeat_each_other_only_word_for_word() -> None:
    assert _found(["a red bus", "a blue bus", "a red cup", "two dogs"]).repeated == 0


def test_the_largest_group_comes_first_with_its_different_wordings_in_front() -> None:
    base = _texts(1, words=150)[0]
    near = [base, base, _changed(base, 1), base, _changed(base, 1, seed=2)]
    found = _found([*["the same words as ever"] * 3, *near, *_texts(50, seed=9)])

    assert [group.size for group in found.largest] == [5, 3]
    assert found.largest[0].members == [3, 5, 7, 4]
    assert found.repeated == 8


def test_no_more_groups_than_wanted_are_named_but_all_are_counted() -> None:
    found = _found([text for text in _texts(30) for _ in range(2)], count=4)
    assert (found.groups, found.repeated, len(found.largest)) == (30, 60, 4)


def test_captions_beyond_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_CAPTIONS", 100)
    found = _found(["the same words"] * 250, batch=50)
    assert (found.compared, found.repeated) == (100, 100)


def test_a_run_of_nothing_but_one_caption_is_one_group() -> None:
    found = _found(["a caption that was written for every image there is"] * 20_000)
    assert (found.repeated, found.groups, found.largest[0].members) == (20_000, 1, [0, 1, 2, 3])
