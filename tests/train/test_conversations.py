"""What becomes of conversations as the wild has them: a named policy for each fault."""

import pytest

from sharegpt4v.errors import Rejected
from sharegpt4v.train.conversations import POLICIES, read_conversation


def turns(*pairs: str) -> list[dict[str, str | None]]:
    """`human: text` and the like."""
    return [dict(zip(("from", "value"), pair.split(": ", 1), strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("reason", "pairs"),
    [
        ("no_turns", ()),
        ("unknown_role", ("human: a", "robot: b")),
        ("starts_with_assistant", ("gpt: b", "human: a", "gpt: b")),
        ("roles_do_not_alternate", ("human: a", "human: b", "gpt: c")),
        ("ends_with_user", ("human: a", "gpt: b", "human: c")),
        ("empty_answer", ("human: a", "gpt:  \n")),
        ("several_image_marks", ("human: <image> a <image>", "gpt: b")),
    ],
)
def test_faults_are_dropped_with_their_reason(reason: str, pairs: tuple[str, ...]) -> None:
    with pytest.raises(Rejected) as caught:
        read_conversation(turns(*pairs), with_image=True)
    assert caught.value.reason == reason
    assert POLICIES[reason].startswith("dropped")


def test_an_image_without_a_mark_goes_to_the_first_question_and_is_counted() -> None:
    talk = read_conversation(turns("human: a", "gpt: b"), with_image=True)
    assert (talk.image_turn, talk.repaired) == (0, "no_image_mark")
    assert POLICIES["no_image_mark"].startswith("kept")


@pytest.mark.parametrize("question", ["<image>\na", "a\n<image>", "<image> a"])
def test_the_mark_leaves_the_text_wherever_it_was(question: str) -> None:
    talk = read_conversation(turns(f"human: {question}", "gpt: b"), with_image=True)
    assert talk.texts == ("a", "b") and talk.image_turn == 0 and talk.repaired is None


def test_an_image_may_come_in_a_later_question() -> None:
    talk = read_conversation(turns("human: a", "gpt: b", "human: <image>\nc", "gpt: d"), with_image=True)
    assert talk.image_turn == 2 and talk.texts[2] == "c"


def test_without_an_image_and_in_answers_the_mark_is_plain_text() -> None:
    talk = read_conversation(turns("human: what is <image>?", "gpt: <image>"), with_image=False)
    assert talk.texts == ("what is <image>?", "<image>") and talk.image_turn is None
    talk = read_conversation(turns("human: <image>\na", "gpt: <image> b"), with_image=True)
    assert talk.texts == ("a", "<image> b")


def test_other_spellings_of_roles_are_read() -> None:
    assert read_conversation(turns("user: a", "assistant: b"), with_image=False).texts == ("a", "b")
