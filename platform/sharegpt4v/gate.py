"""Refuses captions that a captioner should not have written.

Each rule has a code that rejects are counted by. The gate sees one caption at a time and no image;
it finds faults of the text itself, not untrue statements.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass

_REFUSAL = re.compile(
    r"(?:^|[.!?]\s+)(?:(?:i'?m|i am) (?:sorry|unable|not able)\b|i (?:cannot|can'?t|can not) "
    r"(?:help|assist|describe|see|view|provide|identify|process)\b|as an ai\b)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d|(?<!\w)'[^']*'(?!\w)")
_BOILERPLATE = re.compile(
    r"\b(?:please (?:provide|upload|share) (?:the|an|your) image|no image (?:was|is|has been) "
    r"(?:provided|attached|uploaded)|if you have any (?:other |further |more )?questions|"
    r"let us imagine (?:an?|the) (?:image|picture|scene)|hypothetical image)\b",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[^\W\d_]")
_FOREIGN_LETTER = re.compile(r"[^\W\d_\u0000-\u024f]")
_SENTENCE_END = re.compile(r"[.!?。！？\"')\]]\s*$")


@dataclass(frozen=True, slots=True)
class GateRules:
    """min_characters: shorter captions are far too short. max_foreign_share: letters outside `script`.

    script: the writing system captions are expected in, `latin` or `any`.
    """

    min_characters: int = 20
    max_foreign_share: float = 0.2
    script: str = "latin"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a caption is refused."""

    reason: str
    message: str


def check_caption(caption: str, finish_reason: str, rules: GateRules) -> Verdict | None:
    """Returns None when the caption may be written, else the first rule it breaks.

    Order matters: a refusal is usually short, too, and its own name tells more.
    """
    text = caption.strip()
    if not text:
        return Verdict("empty_caption", "the model wrote nothing")
    own_words = _QUOTED.sub("", text)  # a sign may say "I'm sorry, we are closed"
    if match := _REFUSAL.search(own_words[:300]):
        return Verdict("refusal", f"the model refused: {match.group(0)!r}")
    if match := _BOILERPLATE.search(own_words):
        return Verdict("boilerplate", f"the text is not about the image: {match.group(0)!r}")
    if loop := _repeated_phrase(text):
        return Verdict("repetition", f"the caption repeats {loop!r}")
    if finish_reason == "length" and not _SENTENCE_END.search(text):
        return Verdict("cut_at_length_limit", f"the caption was cut after {len(text)} characters")
    if len(text) < rules.min_characters:
        return Verdict("too_short", f"{len(text)} characters, at least {rules.min_characters} expected")
    share = _foreign_share(text) if rules.script == "latin" and not _plainly_latin(text) else 0.0
    if share > rules.max_foreign_share:
        return Verdict("wrong_script", f"{share:.0%} of the letters are not {rules.script}")
    return None


def _repeated_phrase(text: str) -> str | None:
    """Finds a repeated phrase: five words four times, or a text that compresses to almost nothing."""
    words = text.lower().split()
    if len(words) >= 20:
        phrases = Counter(zip(words, words[1:], words[2:], words[3:], words[4:], strict=False))
        phrase = max(phrases, key=phrases.__getitem__)
        if phrases[phrase] >= 4 and phrases[phrase] * 5 > 0.3 * len(words):
            return " ".join(phrase)
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) >= 200 and len(zlib.compress(raw)) < 0.12 * len(raw):
        return text[:40]
    return None


def _plainly_latin(text: str) -> bool:
    """Returns whether all letters are ASCII and there is one, as in nearly every caption."""
    return text.isascii() and _LETTER.search(text) is not None


def _foreign_share(text: str) -> float:
    """Returns the share of letters past Latin Extended-B (U+024F); accents and diacritics count as Latin."""
    letters = len(_LETTER.findall(text))
    return len(_FOREIGN_LETTER.findall(text)) / letters if letters else 1.0
