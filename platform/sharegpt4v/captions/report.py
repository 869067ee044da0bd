"""`report.html` of a finished run: one self-contained page to look at, to send, and to keep.

The page loads nothing: style, script, charts and pictures are inside. All captions are read once, in batches;
only the sampled ones become Python objects.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.cards import Card, add_pictures, make_card, source_label
from sharegpt4v.captions.notes import read_summary
from sharegpt4v.captions.overview import Overview, read_overview
from sharegpt4v.captions.page import MAX_BYTES, PAGE_BYTES, printable, template
from sharegpt4v.captions.toy_warning import toy_warning
from sharegpt4v.errors import UserError
from sharegpt4v.run import charts, timeline
from sharegpt4v.run.settings import read_settings

MAX_SAMPLE = 400
"""Captions drawn evenly for the gallery, at most; up to 100 others and 100 rejects come on top."""

PROMPT_CHARACTERS = 20_000
"""Longest prompt shown in full."""

TABLE_ROWS = 40
"""Sources or reasons listed one by one; the rest share a last line."""


@dataclass
class Line:
    """One line of a table: a source or a reason. linked: the gallery can be narrowed to it."""

    name: str
    captions: int
    rejects: int
    linked: bool = True


def write_report(run: Path, *, root: str | None, sample: int = MAX_SAMPLE, seed: int = 0) -> Path:
    """Writes `run`/report.html, completely or not at all, and returns its path.

    root: where the manifest's image paths begin, for the pictures; an image that is gone is shown as
        a placeholder.
    sample: captions drawn evenly for the gallery, by their ids and `seed` alone.
    Raises UserError for a sample over MAX_SAMPLE.
    """
    if not 0 <= sample <= MAX_SAMPLE:
        raise UserError(f"{sample} captions are too many: a report shows 0 to {MAX_SAMPLE}", field="sample")
    summary = read_summary(run)
    settings = read_settings(run)
    overview = read_overview(run, sample, seed)
    rows = sorted(overview.captions + overview.rejects, key=lambda row: row["key"])
    cards = [make_card(row, order) for order, row in enumerate(rows)]
    repeated = {at: make_card(row, order) for order, (at, row) in enumerate(overview.repeated.items())}
    everything = [*cards, *repeated.values()]
    add_pictures(run, root, everything, MAX_BYTES - PAGE_BYTES - sum(card.text_bytes for card in everything))
    text = template("report.html.j2").render(
        name=run.resolve().name,
        summary=summary,
        overview=overview,
        prompt=printable(settings["prompt_text"], PROMPT_CHARACTERS),
        settings=_settings(settings),
        warning=toy_warning(summary["model"]),
        root=root,
        seed=seed,
        groups=[(group, [repeated[at] for at in group.members]) for group in overview.repeats.largest],
        **_charts(summary, overview),
        **_gallery(cards),
    )
    path = run / "report.html"
    write_atomic(path, text)
    return path


def _charts(summary: Mapping[str, Any], overview: Overview) -> dict[str, Any]:
    commits = [(commit["time"], commit["rows"]) for commit in summary["commits"]]
    started = datetime.fromisoformat(summary["started"]).timestamp()
    by_reason = summary["by_reason"].items()
    return {
        "lengths": charts.histogram(overview.lengths),
        "throughput": timeline.throughput(commits, summary["sessions"], started),
        "sources": _head(
            [
                Line(source_label(name), n["captions"], n["rejects"])
                for name, n in summary["by_source"].items()
            ],
            "sources",
        ),
        "reasons": _head([Line(printable(name), 0, count) for name, count in by_reason], "reasons"),
    }


def _gallery(cards: Sequence[Card]) -> dict[str, Any]:
    flags = Counter(flag for card in cards for flag in card.flags)
    drawn = flags["drawn"]
    return {
        "cards": cards,
        "kinds": [
            ("drawn", "Even draw", drawn if drawn < len(cards) else 0),
            *[(flag, flag.capitalize(), flags[flag]) for flag in ("retried", "cut", "rejected")],
        ],
        "gallery": Counter(card.source for card in cards).most_common(),
        "drawn": drawn,
        "added": sum(bool(card.added) for card in cards),
        "rejected": flags["rejected"],
        "without_image": sum(card.picture is None and card.decoded for card in cards),
    }


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what decided the captions, then what ran: entries of run.yaml except model and prompt."""
    decided = {k: v for k, v in settings["fingerprint"].items() if k not in ("model", "prompt")}
    versions = {name: version for name, version in settings["versions"].items() if version}
    ran = {**versions, "git revision": settings["git_revision"]}
    return [(key, printable(str(value))) for key, value in {**decided, **ran}.items()]


def _head(lines: list[Line], what: str) -> list[Line]:
    """Returns the largest lines, the others summed into one."""
    lines.sort(key=lambda line: -(line.captions + line.rejects))
    if len(lines) <= TABLE_ROWS:
        return lines
    head, rest = lines[: TABLE_ROWS - 1], lines[TABLE_ROWS - 1 :]
    captions, rejects = sum(line.captions for line in rest), sum(line.rejects for line in rest)
    return [*head, Line(f"{len(rest):,} more {what}", captions, rejects, linked=False)]
