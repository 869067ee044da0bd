"""`report.html` of a finished run: one self-contained page to look at, to send, and to keep.

The page loads nothing: style, script, charts and thumbnails are inside. All captions are read once, in
batches; only the sampled ones become Python objects.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import escape

from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions import parts
from sharegpt4v.captions.thumbnails import Thumbnailer
from sharegpt4v.captions.toy_warning import toy_warning
from sharegpt4v.errors import UserError
from sharegpt4v.run import charts, timeline

MAX_SAMPLE = 500
"""Captions in the gallery, at most."""

MAX_BYTES = 20_000_000
"""Size of the page, whatever the images and captions are."""

PAGE_BYTES = 2_000_000
"""What the page may take beside captions and thumbnails: style, script, charts, tables, card markup."""

CAPTION_CHARACTERS = 4_000
"""Longest caption shown in full: over four times the paper's mean length (reference: 942)."""

FIELD_CHARACTERS = 300
"""Longest id, path, source or message shown in full."""

TABLE_ROWS = 40
"""Sources or reasons listed one by one; the rest share a last line."""

READERS = 8
"""Images read at once: a remote root answers slowly, but answers many."""

EXAMPLES = 4
"""Rejected images shown for each reason."""

# Control characters would be lost or would upset the layout: show the Unicode pictures of them.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass
class Card:
    """One caption of the gallery; texts are clipped and made printable."""

    id: str
    source: str
    image: str
    caption: str
    characters: int  # of the whole caption
    tokens: int
    finish_reason: str
    retried: bool
    size: str  # width x height in pixels
    thumbnail: str | None = None  # data URI; None when the image could not be read

    @property
    def clipped(self) -> bool:
        return self.characters > len(self.caption)


@dataclass
class Line:
    """One line of a table: a source or a reason with its counts, and examples for a reason."""

    name: str
    captions: int
    rejects: int
    examples: list[dict[str, str]] = field(default_factory=list)


def write_report(run: Path, *, root: str | None, sample: int = MAX_SAMPLE, seed: int = 0) -> Path:
    """Write `run`/report.html, whole or not at all, and return its path.

    root: where the manifest's image paths begin, for the thumbnails; an image that is gone is shown as
        a placeholder.
    sample: captions in the gallery, a uniform draw that depends on their ids and `seed` alone.
    Raises UserError for a sample over MAX_SAMPLE.
    """
    if not 0 <= sample <= MAX_SAMPLE:
        raise UserError(f"{sample} captions are too many: a report shows 0 to {MAX_SAMPLE}", field="sample")
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lengths, rows = _read_captions(run, sample, seed)
    cards = [_card(row) for row in rows]
    _add_thumbnails(run, root, rows, cards)
    commits = [(commit["time"], commit["rows"]) for commit in summary["commits"]]
    page = _template().render(
        name=run.resolve().name,
        summary=summary,
        warning=toy_warning(summary["model"]),
        root=root,
        seed=seed,
        cards=cards,
        gallery=Counter(card.source for card in cards).most_common(),
        without_image=sum(card.thumbnail is None for card in cards),
        sources=_sources(summary["by_source"]),
        reasons=_reasons(summary["by_reason"], run),
        lengths=charts.histogram(lengths),
        throughput=timeline.throughput(commits, summary["sessions"], _unix(summary["started"])),
        chart=charts,
    )
    path = run / "report.html"
    write_atomic(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sharegpt4v.captions", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": timeline.duration, "printable": printable, "moment": _moment}
    return environment.get_template("report.html.j2")


def printable(text: str, limit: int = FIELD_CHARACTERS) -> str:
    """At most `limit` characters, control characters made visible; an ellipsis marks the cut."""
    return (text if len(text) <= limit else text[:limit] + "…").translate(_VISIBLE)


def _read_captions(run: Path, sample: int, seed: int) -> tuple[Counter[int], list[dict[str, Any]]]:
    """Counts by caption length in characters, and the sampled rows, mixed.

    These are the `sample` rows whose keyed hash of the id is smallest, in its order: the draw does not
    depend on how rows are spread over files, and reading them keeps no more than the sample in memory.
    """
    lengths: Counter[int] = Counter()
    chosen: list[tuple[int, str, dict[str, Any]]] = []  # a heap, the largest hash first out
    salt = str(seed).encode()
    for batch in parts.batches(run, "captions"):
        for entry in pc.value_counts(pc.utf8_length(batch.column("caption"))).to_pylist():
            lengths[entry["values"]] += entry["counts"]
        for index, name in enumerate(batch.column("id").to_pylist()):
            key = -int.from_bytes(blake2b(name.encode(), digest_size=8, key=salt).digest())
            if len(chosen) < sample:
                heapq.heappush(chosen, (key, name, _row(batch, index)))
            elif chosen and key > chosen[0][0]:
                heapq.heapreplace(chosen, (key, name, _row(batch, index)))
    return lengths, [row for _, _, row in sorted(chosen, key=lambda entry: entry[:2], reverse=True)]


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    return row


def _card(row: Mapping[str, Any]) -> Card:
    return Card(
        id=printable(row["id"]),
        source=printable(row["source"], 60),
        image=printable(row["image"]),
        caption=row["caption"][:CAPTION_CHARACTERS].translate(_VISIBLE),
        characters=len(row["caption"]),
        tokens=row["tokens"],
        finish_reason=row["finish_reason"],
        retried=row["attempt"] > 0,
        size=f"{row['width']} × {row['height']}",
    )


def _add_thumbnails(run: Path, root: str | None, rows: list[dict[str, Any]], cards: list[Card]) -> None:
    """Give each card its image, as large as the page's size allows after all texts are in."""
    if not cards:
        return
    text = sum(len(escape(c.caption + 2 * c.id + 2 * c.source + c.image).encode()) for c in cards)
    thumbnailer = Thumbnailer(root, (MAX_BYTES - PAGE_BYTES - text) // len(cards))
    locations = parts.locations(run, (row["id"] for row in rows))
    places = [locations[row["id"]] for row in rows]
    widths, heights = [row["width"] for row in rows], [row["height"] for row in rows]
    with ThreadPoolExecutor(READERS) as pool:
        thumbnails = pool.map(thumbnailer.data_uri, places, widths, heights)
        for card, thumbnail in zip(cards, thumbnails, strict=True):
            card.thumbnail = thumbnail


def _sources(by_source: Mapping[str, Mapping[str, int]]) -> list[Line]:
    lines = [Line(printable(name), n["captions"], n["rejects"]) for name, n in by_source.items()]
    return _head(sorted(lines, key=lambda line: -(line.captions + line.rejects)), "sources")


def _reasons(by_reason: Mapping[str, int], run: Path) -> list[Line]:
    ranked = sorted(by_reason.items(), key=lambda item: -item[1])
    examples = _examples(run, [name for name, _ in ranked[:TABLE_ROWS]])
    return _head([Line(printable(name), 0, n, examples.get(name, [])) for name, n in ranked], "reasons")


def _head(lines: list[Line], what: str) -> list[Line]:
    """The first lines, the others summed into one."""
    if len(lines) <= TABLE_ROWS:
        return lines
    head, rest = lines[: TABLE_ROWS - 1], lines[TABLE_ROWS - 1 :]
    captions, rejects = sum(line.captions for line in rest), sum(line.rejects for line in rest)
    return [*head, Line(f"{len(rest):,} more {what}", captions, rejects)]


def _examples(run: Path, reasons: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """The first few rejects of each reason; reading ends once every reason has its examples."""
    missing = dict.fromkeys(reasons, EXAMPLES)
    found: dict[str, list[dict[str, str]]] = {reason: [] for reason in missing}
    for batch in parts.batches(run, "rejects", ["id", "source", "stage", "reason", "message"]):
        if not missing:
            break
        names = batch.column("reason")
        for reason in list(missing):
            rows = batch.filter(pc.equal(names, reason)).slice(0, missing[reason]).to_pylist()
            found[reason] += [{key: printable(value or "") for key, value in row.items()} for row in rows]
            missing[reason] -= len(rows)
            if not missing[reason]:
                del missing[reason]
    return found


def _unix(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _moment(moment: str) -> str:
    """`2026-03-01 14:05 UTC` for an ISO 8601 time."""
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M %Z").strip()
