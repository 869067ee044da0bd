"""Which rows of a run its report shows: an even draw, and more of what a reader looks for.

Rows are chosen by a keyed hash of their ids, so the choice does not depend on how they are spread over
files. Memory holds the chosen rows and one batch.
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.records import CAPTIONS

Row = dict[str, Any]
"""A row of records.CAPTIONS or REJECTS, its caption clipped; also key (its place in random order, uint64),
characters (of the whole caption) and chosen (names of the draws that it is in)."""

CAPTION_CHARACTERS = 4_000
"""Longest caption shown in full: over four times the paper's mean length (reference: 942)."""

MAX_REJECTS = 100
"""Rejects shown, spread evenly over their reasons."""

MAX_REASONS = 40

_BY_KEY = [("key", "ascending")]
_DRAWS: dict[str, tuple[int, Callable[[pa.Table], Any] | None, list[tuple[str, str]]]] = {
    "retried": (40, lambda table: pc.greater(table["attempt"], 0), _BY_KEY),
    "cut": (40, lambda table: pc.equal(table["finish_reason"], "length"), _BY_KEY),
    "shortest": (10, None, [("characters", "ascending"), *_BY_KEY]),
    "longest": (10, None, [("characters", "descending"), *_BY_KEY]),
}
"""Draws beside the even one: how many rows, of which, and the first in which order."""

MAX_ADDED = sum(size for size, _, _ in _DRAWS.values())


def sampling_keys(ids: pa.Array, seed: int) -> npt.NDArray[np.uint64]:
    """Returns a random number for each id that depends on the id and `seed` alone."""
    salt = str(seed).encode()
    digests = (blake2b(name.encode(), digest_size=8, key=salt).digest() for name in ids.to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


class CaptionSample:
    """An even draw of `size` captions, named `drawn`, and the draws of _DRAWS on top of it."""

    def __init__(self, size: int, seed: int) -> None:
        self._seed = seed
        self._draws = {"drawn": (size, None, _BY_KEY), **_DRAWS}
        self._kept = {name: _with_keys(CAPTIONS.empty_table(), seed) for name in self._draws}

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes rows of records.CAPTIONS."""
        table = _with_keys(pa.Table.from_batches([batch]), self._seed)
        for name, (size, condition, order) in self._draws.items():
            offered = table.filter(condition(table)) if condition else table
            self._kept[name] = _first(pa.concat_tables([self._kept[name], offered]), size, order)

    def rows(self) -> list[Row]:
        """Returns each chosen row once, in random order."""
        rows: dict[str, Row] = {}
        for name, kept in self._kept.items():
            for row in kept.to_pylist():
                rows.setdefault(row["id"], row | {"chosen": []})["chosen"].append(name)
        return sorted(rows.values(), key=lambda row: row["key"])


class RejectSample:
    """MAX_REJECTS rejects: one of each reason in turn, so that rare reasons are seen beside frequent ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kept: dict[str, pa.Table] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes rows of records.REJECTS; reasons beyond the first MAX_REASONS are left out."""
        table = _with_keys(pa.Table.from_batches([batch]), self._seed)
        for reason in pc.unique(table["reason"]).to_pylist():
            if reason in self._kept or len(self._kept) < MAX_REASONS:
                offered = table.filter(pc.equal(table["reason"], reason))
                kept = self._kept.get(reason, offered.slice(0, 0))
                self._kept[reason] = _first(pa.concat_tables([kept, offered]), MAX_REJECTS, _BY_KEY)

    def rows(self) -> list[Row]:
        """Returns the chosen rows in random order."""
        ranked = [(rank, row) for kept in self._kept.values() for rank, row in enumerate(kept.to_pylist())]
        ranked.sort(key=lambda item: (item[0], item[1]["key"]))
        return sorted((row | {"chosen": []} for _, row in ranked[:MAX_REJECTS]), key=lambda row: row["key"])


def _with_keys(table: pa.Table, seed: int) -> pa.Table:
    whole = table["caption"]
    clipped = pc.utf8_slice_codeunits(whole, 0, CAPTION_CHARACTERS)
    table = table.set_column(table.schema.get_field_index("caption"), "caption", clipped)
    table = table.append_column("characters", pc.fill_null(pc.utf8_length(whole), 0))
    return table.append_column("key", pa.array(sampling_keys(table["id"], seed)))


def _first(table: pa.Table, size: int, order: list[tuple[str, str]]) -> pa.Table:
    return table.take(pc.select_k_unstable(table, size, order)) if len(table) > size else table
