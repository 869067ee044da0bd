"""Two finished runs side by side as one page: what was set otherwise, what came of it, pairs of captions."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions import parts
from sharegpt4v.captions.cards import Card, add_pictures, make_card
from sharegpt4v.captions.overlap import Overlap, Side, captioned_by_both, count_overlap, read_side
from sharegpt4v.captions.page import MAX_BYTES, PAGE_BYTES, printable, template
from sharegpt4v.captions.sample import Row
from sharegpt4v.captions.toy_warning import toy_warning
from sharegpt4v.captions.word_diff import Segment, word_diff
from sharegpt4v.errors import UserError
from sharegpt4v.run import charts

MAX_PAIRS = 300
"""Images shown with both captions, drawn evenly."""


@dataclass(frozen=True)
class Pair:
    """One image with both captions. difference: the share of words that differ, 0 to 1."""

    left: Card
    right: Card
    left_parts: list[Segment]
    right_parts: list[Segment]
    difference: float

    @property
    def flag(self) -> str:
        return "different" if self.difference else "same"

    @property
    def text_bytes(self) -> int:
        """What its texts take in a page, the marks around words included."""
        marks = len("<mark></mark>") * (len(self.left_parts) + len(self.right_parts))
        return self.left.text_bytes + self.right.text_bytes + marks


def write_comparison(a: Path, b: Path, out: Path) -> Overlap:
    """Writes the page `out`, completely or not at all, and returns what the runs have in common.

    Raises UserError for a run that is not finished, for runs without an image that both captioned, and for
    an `out` that cannot be written.
    """
    left, right = read_side(a), read_side(b)
    overlap = count_overlap(left, right)
    if not overlap.both:
        raise UserError(
            f"{a} and {b} have no image that both captioned, by id ({len(left.captions):,} and "
            f"{len(right.captions):,} captions): give two runs over the same manifest"
        )
    pairs = _pairs(left, right)
    text = template("compare.html.j2").render(
        sides=(left, right),
        overlap=overlap,
        warnings=[
            (letter, toy_warning(side.summary["model"])) for letter, side in (("A", left), ("B", right))
        ],
        settings=_settings(left.settings, right.settings),
        figures=list(zip(_figures(left.summary).items(), _figures(right.summary).values(), strict=True)),
        reasons=_reasons(left.summary["by_reason"], right.summary["by_reason"]),
        lengths=(
            charts.histogram(left.lengths, right.lengths),
            charts.histogram(right.lengths, left.lengths),
        ),
        pairs=pairs,
        flags=Counter(pair.flag for pair in pairs),
        gallery=Counter(pair.left.source for pair in pairs).most_common(),
    )
    try:
        write_atomic(out, text)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another", field="out") from None
    return overlap


def _pairs(left: Side, right: Side) -> list[Pair]:
    """Returns up to MAX_PAIRS pairs with pictures from where the left run read them."""
    at_left, at_right = (positions[:MAX_PAIRS].tolist() for positions in captioned_by_both(left, right))
    lefts, rights = (
        parts.rows_at(left.run, "captions", at_left),
        parts.rows_at(right.run, "captions", at_right),
    )
    pairs = [
        _pair(lefts[first], rights[second], order)
        for order, (first, second) in enumerate(zip(at_left, at_right, strict=True))
    ]
    limit = MAX_BYTES - PAGE_BYTES - sum(pair.text_bytes for pair in pairs)
    add_pictures(left.run, left.settings["root"], [pair.left for pair in pairs], limit)
    return pairs


def _pair(left: Row, right: Row, order: int) -> Pair:
    cards = [
        make_card(row | {"characters": len(row["caption"]), "chosen": []}, order) for row in (left, right)
    ]
    left_parts, right_parts, difference = word_diff(cards[0].text, cards[1].text)
    return Pair(cards[0], cards[1], left_parts, right_parts, difference)


def _settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns name and both values of run.yaml entries that differ and decide captions or say what ran."""
    one, other = (
        {
            "images": side["root"],
            **side["fingerprint"],
            **side["versions"],
            "git revision": side["git_revision"],
        }
        for side in (left, right)
    )
    return [
        (printable(key), printable(str(one.get(key, "—"))), printable(str(other.get(key, "—"))))
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def _figures(summary: Mapping[str, Any]) -> dict[str, str]:
    characters = summary["caption_characters"]
    return {
        "images": f"{summary['rows']:,}",
        "captions": f"{summary['captions']:,}",
        "rejects": f"{summary['rejects']:,} ({summary['reject_rate']:.2%})",
        "characters, mean": f"{characters['mean']:,.0f}",
        "characters, median": f"{characters['median']:,.0f}",
        "tokens a caption": f"{summary['tokens'] / max(1, summary['captions']):,.0f}",
        "images per second": f"{summary['images_per_second']:,.3g}" if summary["images_per_second"] else "–",
        "engine": printable(summary["engine"]),
    }


def _reasons(left: Mapping[str, int], right: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Returns each reason and its rejects in both runs, the most frequent first."""
    ranked = (Counter(left) + Counter(right)).most_common()
    return [(printable(name), left.get(name, 0), right.get(name, 0)) for name, _ in ranked]
