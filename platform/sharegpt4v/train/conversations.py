"""Checks a conversation as training files hold it, and brings it to turns; each fault has a named policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharegpt4v.errors import Rejected

MARK = "<image>"
"""Where the released files put the image into a human turn; elsewhere it is plain text."""

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

POLICIES: Mapping[str, str] = {
    "no_turns": "dropped: the record has no conversation",
    "unknown_role": "dropped: a turn is neither human nor gpt",
    "starts_with_assistant": "dropped: a dialogue begins with the user",
    "roles_do_not_alternate": "dropped: two turns of one role follow each other",
    "ends_with_user": "dropped: the last question has no answer",
    "empty_answer": "dropped: an answer is empty",
    "several_image_marks": "dropped: more than one <image> for one image",
    "no_image_mark": "kept: the image goes to the front of the first question",
}
"""What happens to a record with each fault, by reason."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """texts: questions and answers in turn. image_turn: which one has the image, None without an image.

    repaired: the policy that was applied to a record that is kept, None for a faultless one.
    """

    texts: tuple[str, ...]
    image_turn: int | None
    repaired: str | None = None


def read_conversation(turns: Sequence[Mapping[str, str | None]] | None, with_image: bool) -> Conversation:
    """Returns what a record says. with_image: it names an image.

    Without an image every <image> is plain text; with one, those of answers are. Raises Rejected with a
    reason of POLICIES.
    """
    if not turns:
        raise Rejected("no_turns", "the record has no conversation")
    roles = [_ROLES.get(turn.get("from") or "") for turn in turns]
    _check_roles(roles, [turn.get("from") for turn in turns])
    texts = [turn.get("value") or "" for turn in turns]
    for number, text in enumerate(texts):
        if number % 2 and not text.strip():
            raise Rejected("empty_answer", f"turn {number + 1} is an answer without a letter")
    if not with_image:
        return Conversation(tuple(texts), None)
    marked = [number for number in range(0, len(texts), 2) for _ in range(texts[number].count(MARK))]
    if len(marked) > 1:
        raise Rejected("several_image_marks", f"{len(marked)} times {MARK} for one image")
    at = marked[0] if marked else 0
    texts[at] = texts[at].replace(MARK, "").strip()
    return Conversation(tuple(texts), at, None if marked else "no_image_mark")


def _check_roles(roles: Sequence[str | None], spelt: Sequence[str | None]) -> None:
    if None in roles:
        raise Rejected("unknown_role", f"turn {roles.index(None) + 1} is from {spelt[roles.index(None)]!r}")
    if roles[0] == "gpt":
        raise Rejected("starts_with_assistant", "the first turn is the assistant's")
    for number, (role, wanted) in enumerate(zip(roles, ["human", "gpt"] * len(roles), strict=False), start=1):
        if role != wanted:
            raise Rejected("roles_do_not_alternate", f"turn {number} is a second one of {role}")
    if roles[-1] == "human":
        raise Rejected("ends_with_user", f"the last of {len(roles)} turns is a question")
