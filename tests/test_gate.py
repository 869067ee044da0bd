"""What the gate refuses, and what it must let pass."""

import pytest

from sharegpt4v.gate import GateRules, check_caption

GOOD = (
    "A large red circle sits at the top left of a pale background. Below it a small blue square leans "
    "against the frame, and a yellow star hangs in the upper right corner."
)


@pytest.mark.parametrize(
    ("caption", "finish_reason", "reason"),
    [
        ("", "stop", "empty_caption"),
        (" \n\t ", "stop", "empty_caption"),
        ("I'm sorry, but I can't help with identifying people.", "stop", "refusal"),
        ("I cannot describe this picture for you today, friend.", "stop", "refusal"),
        ("As an AI language model I have no eyes to see with.", "stop", "refusal"),
        ("Please provide the image so that a description can be written.", "stop", "boilerplate"),
        ("Let us imagine an image of a harbour at dusk with boats.", "stop", "boilerplate"),
        ("A cat on the mat by the door. " * 20, "stop", "repetition"),
        ("the the the " * 60, "stop", "repetition"),
        ("A long street leads past the houses and the trees and the", "length", "cut_at_length_limit"),
        ("A cat.", "stop", "too_short"),
        ("Это очень подробное описание картины на другом языке.", "stop", "wrong_script"),
        ("这是一张非常详细的图片描述，里面有很多的东西可以看到。", "stop", "wrong_script"),
        ("12345 67890 !!! ??? 12345 67890", "stop", "wrong_script"),
    ],
)
def test_a_bad_caption_is_refused_by_name(caption: str, finish_reason: str, reason: str) -> None:
    verdict = check_caption(caption, finish_reason, GateRules())
    assert verdict is not None and verdict.reason == reason


@pytest.mark.parametrize(
    "caption",
    [
        GOOD,
        "Une fenêtre ouverte donne sur la vieille ville; à droite, un garçon lève les yeux.",
        "The sign reads 停車場 in large letters above the entrance of a grey concrete building.",
        "The shop's sign says 'I can see clearly now', painted in blue on a yellow board.",
        'A handwritten note on the door reads "I\'m sorry, we are closed today", in black ink.',
        "A record sleeve reads 'I cannot help falling in love', above a dancing couple.",
        "Waves break on the shore, and it is easy to imagine the sound of the water here.",
    ],
)
def test_a_good_caption_passes(caption: str) -> None:
    assert check_caption(caption, "stop", GateRules()) is None


def test_a_caption_that_ends_its_sentence_at_the_limit_passes() -> None:
    assert check_caption(GOOD, "length", GateRules()) is None


def test_any_script_is_taken_when_told_so() -> None:
    assert (
        check_caption(
            "这是一张非常详细的图片描述，里面有很多的东西可以看到。", "stop", GateRules(script="any")
        )
        is None
    )


def test_the_shortest_length_is_a_rule() -> None:
    assert check_caption("A cat.", "stop", GateRules(min_characters=6)) is None


def test_hostile_text_is_judged_without_a_crash() -> None:
    for text in ("\x00" * 50, "\ud800" * 50, "\u202e" + GOOD, "a" * 1_000_000):
        check_caption(text, "stop", GateRules())
