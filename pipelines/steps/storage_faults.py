"""Rows whose storage failed are put off to the end of the run; a run whose storage is dead is stopped.

A row that can neither be read nor be called bad has no outcome. Whether all of a storage is dead or just a
part of it (a host among many, a folder that may not be read) does not show in the rows that come one after
the other, which are often neighbours there as well: after some faults a sample of all that is left is read.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageReader, StorageError
from sharegpt4v.records import LOCATION_COLUMNS

PUT_OFF = "put_off"
"""Stands where a decoded row has its reject reason; no outcome ever has it."""

JUDGED_AFTER = 8
"""Faults after which the sample is read, again and again: each has cost more time than the sample does."""

SAMPLE = 5
"""Images, evenly spread over what is left; the storage counts as dead when most of them cannot be read."""

_MESSAGES = 1_000
"""Rows of which a message is kept."""

Place = tuple[str, str, int, int]
NextStep = Literal["go on", "look", "stop"]


@dataclass(slots=True)
class StorageFaults:
    """What the ledger knows of rows that were put off."""

    count: int = 0
    messages: dict[str, str] = field(default_factory=dict)
    dead: str | None = None
    """Why the run must end; it stays once it is set."""

    def put_off(self, key: str, message: str) -> NextStep:
        """Notes a row. `look`: the caller should call most_fail(), and give_up() where it tells a cause."""
        self.count += 1
        if len(self.messages) < _MESSAGES:
            self.messages[key] = message
        if self.dead:
            return "stop"
        return "look" if self.count % JUDGED_AFTER == 0 else "go on"

    def give_up(self, cause: str) -> None:
        """Notes that the storage is dead."""
        self.dead = self.dead or cause

    def begin_again(self) -> None:
        """Forgets the rows that are now tried again."""
        self.count = 0
        self.messages.clear()


def sample_places(files: Sequence[Path]) -> list[Place]:
    """Returns where SAMPLE images of these files of work/pending lie; none where they hold few images."""
    sizes = [pq.read_metadata(file).num_rows for file in files]
    if sum(sizes) <= JUDGED_AFTER:
        return []
    wanted = [(2 * number + 1) * sum(sizes) // (2 * SAMPLE) for number in range(SAMPLE)]
    places: list[Place] = []
    for file, size in zip(files, sizes, strict=True):
        rows = [row for row in wanted if 0 <= row < size]
        wanted = [row - size for row in wanted]
        if rows:
            table = pq.read_table(file, columns=list(LOCATION_COLUMNS)).take(rows)
            places += zip(*(table[name].to_pylist() for name in LOCATION_COLUMNS), strict=True)
    return places


def most_fail(reader: ImageReader, sample: Sequence[Place]) -> str | None:
    """Returns the cause when more than half of a sample cannot be read, after all tries; else None.

    Stops as soon as that is clear. An image that is missing or broken was read: its storage answers.
    """
    failed = answered = 0
    for place in sample:
        try:
            copy.copy(reader).read(
                *place
            )  # a copy does not know that the storage is failing, and tries again
            answered += 1
        except Rejected:
            answered += 1
        except StorageError as fault:
            failed += 1
            if 2 * failed > len(sample):
                return str(fault)
        if 2 * answered >= len(sample):
            return None
    return None
