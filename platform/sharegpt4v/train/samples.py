"""Makes training samples of records: ids and labels by the stage's template, and decoded images."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from sharegpt4v.dialogue import Image, ImageProtocol, Turn
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageReader, prepare
from sharegpt4v.templates import IGNORE_INDEX, Template, TrainingIds
from sharegpt4v.train.collate import Sample
from sharegpt4v.train.records import Record


class RecordSource(Protocol):
    """Records by number, as Records gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Record: ...


@dataclass(frozen=True, slots=True)
class SampleRules:
    """How a record becomes a sample.

    image_size: pixels a side. max_length: tokens. too_long: cut at a turn's end, or refuse the data.
    question: replaces every question; None keeps them.
    """

    image_size: int
    protocol: ImageProtocol
    max_length: int
    too_long: Literal["cut", "refuse"] = "cut"
    question: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record without its pixels. cut: rounds that were cut off at the end. with_image: it shows one."""

    record: Record
    ids: TrainingIds
    cut: int
    with_image: bool

    @property
    def tokens(self) -> int:
        return len(self.ids.input_ids)


class SampleMaker:
    """Encodes and decodes records by number; may be used from several threads."""

    def __init__(self, records: RecordSource, template: Template, rules: SampleRules) -> None:
        self.records, self.template, self.rules = records, template, rules
        self._readers: dict[str | None, ImageReader] = {}
        # Any array will do: a template asks how many images there are, not what they show.
        self._any_image: tuple[Image, ...] = (np.zeros((1, 1, 3), np.uint8),)
        # A tokenizer is used by one thread at a time: its settings change with each call.
        self._one_at_a_time = threading.Lock()

    def encode(self, number: int) -> Encoded:
        """Returns a record's ids and labels.

        Raises Rejected: too_long (the first round alone is), no_label; UserError for a sample that is too
        long where the rules refuse one.
        """
        record = self.records[number]
        turns = self._turns(record)
        rounds = len(turns) // 2
        for kept in range(rounds, 0, -1):
            with self._one_at_a_time:
                ids = self.template.example(turns[: 2 * kept])
            if len(ids.input_ids) <= self.rules.max_length:
                if all(label == IGNORE_INDEX for label in ids.labels[1:]):
                    raise Rejected("no_label", f"{record.id}: no token of it has a label")
                at = record.conversation.image_turn
                return Encoded(record, ids, rounds - kept, at is not None and at < 2 * kept)
            if self.rules.too_long == "refuse":
                raise UserError(
                    f"{self.rules.max_length} is refused: {record.id} has {len(ids.input_ids)} tokens; raise "
                    "it, or let `too_long` cut",
                    field="max_length",
                )
        raise Rejected(
            "too_long", f"{record.id}: its first round has more than {self.rules.max_length} tokens"
        )

    def decode(self, encoded: Encoded) -> Sample:
        """Reads the image of a record. Raises Rejected with a reason of `images`, and StorageError."""
        record = encoded.record
        if not encoded.with_image or record.image is None:
            return Sample(encoded.ids, ())
        reader = self._readers.get(record.root)
        if reader is None:
            reader = self._readers[record.root] = ImageReader(record.root)
        data = reader.read(record.image, record.container, record.offset, record.size)
        pixels = prepare(data, self.rules.image_size, self.rules.protocol).pixels
        return Sample(encoded.ids, (pixels,))

    def _turns(self, record: Record) -> Sequence[Turn]:
        talk = record.conversation
        turns = []
        for number, text in enumerate(talk.texts):
            if number % 2:
                turns.append(Turn("assistant", text))
                continue
            images = self._any_image if talk.image_turn == number else ()
            turns.append(Turn("user", text if self.rules.question is None else self.rules.question, images))
        return turns
