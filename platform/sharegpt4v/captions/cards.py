"""Cards of a report's gallery: one image with its caption, or with why it was rejected."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import escape

from sharegpt4v.captions import parts
from sharegpt4v.captions.page import printable
from sharegpt4v.captions.pictures import embedded
from sharegpt4v.captions.sample import CAPTION_CHARACTERS, Row

SOURCE_CHARACTERS = 60


@dataclass
class Card:
    """One image of a gallery; texts are clipped and made printable.

    text: the caption, or what the gate refused, or nothing. order: place in random order, from 0. flags:
    what the gallery can show alone (drawn, retried, cut, rejected). added: why it is shown although it
    was not drawn, or nothing. stage, reason, message: of a reject.
    """

    key: str  # the id as it is
    id: str
    source: str
    image: str
    text: str
    characters: int  # of the whole text
    order: int
    flags: list[str]
    added: str = ""
    tokens: int = 0
    finish_reason: str = ""
    size: str = ""  # width x height in pixels
    retried: bool = False
    stage: str = ""
    reason: str = ""
    message: str = ""
    place: int = 0  # in manifest order
    picture: str | None = None  # data URI; None when the image could not be read

    @property
    def clipped(self) -> bool:
        return self.characters > len(self.text)

    @property
    def decoded(self) -> bool:
        """Whether the run could read the image."""
        return self.stage != "decode"

    @property
    def text_bytes(self) -> int:
        """What its texts take in a page: id, source and reason twice, in an attribute and to read."""
        twice = self.id + self.source + self.reason
        return len(escape(self.text + 2 * twice + self.image + self.message).encode())


def source_label(source: str) -> str:
    """Returns the name of a source for display and filters."""
    return printable(source, SOURCE_CHARACTERS)


def make_card(row: Row, order: int) -> Card:
    """Makes a card of a sampled caption or reject, without its picture."""
    rejected, retried = "reason" in row, row["attempt"] > 0
    flags = {
        "rejected": rejected,
        "retried": retried,
        "cut": row.get("finish_reason") == "length",
        "drawn": "drawn" in row["chosen"],
    }
    card = Card(
        key=row["id"],
        id=printable(row["id"]),
        source=source_label(row["source"]),
        image=printable(row["image"]),
        text=printable((row["caption"] or "")[:CAPTION_CHARACTERS], CAPTION_CHARACTERS),
        characters=row["characters"],
        order=order,
        flags=[name for name, holds in flags.items() if holds],
        retried=retried,
    )
    if rejected:
        card.stage, card.reason = printable(row["stage"]), printable(row["reason"])
        card.message = printable(row["message"] or "")
        return card
    card.added = "" if flags["drawn"] else next(iter(row["chosen"]), "")
    card.tokens, card.finish_reason = row["tokens"], row["finish_reason"]
    card.size = f"{row['width']} × {row['height']}"
    return card


def add_pictures(run: Path, root: str | None, cards: Sequence[Card], limit: int) -> None:
    """Gives each card its place in the manifest and its picture, all pictures together in `limit` bytes.

    An image that could not be decoded is not tried again here: it would be refused again, or end this process
    as it ended a worker.
    """
    locations = parts.locations(run, (card.key for card in cards))
    places = {name: place for place, name in enumerate(locations)}
    wanted = [locations[card.key] if card.decoded else None for card in cards]
    for card, picture in zip(cards, embedded(root, wanted, limit), strict=True):
        card.place, card.picture = places[card.key], picture
