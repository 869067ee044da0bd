"""A sample of a manifest that is spread evenly over its sources, in memory for the sample alone."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.manifest.ids import leading_words
from sharegpt4v.manifest.rows import BATCH_ROWS


def spread(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yields at most `rows` rows of the batches in manifest order, from all sources as evenly as they allow.

    A row is chosen by the digest of its id, so the same manifest gives the same sample, and a larger sample
    holds the smaller one. batches: columns id and source without nulls, one schema.
    """
    chosen = _Candidates(rows)
    for batch in batches:
        if batch.num_rows:
            chosen.add(batch)
    yield from chosen.settle()


def quotas(available: Mapping[str, int], rows: int) -> dict[str, int]:
    """Shares out `rows` rows: every source gets the same number, or all its rows where it has fewer.

    What cannot be shared out evenly goes to the first sources by name. While counts grow, a share only grows
    with its own source's count, and only up to all of its rows: a pruned row is never needed again.
    """
    level, left = 0, rows
    while (growing := [source for source in sorted(available) if available[source] > level]) and left:
        step = min(left // len(growing), min(available[source] for source in growing) - level)
        if not step:
            break
        level, left = level + step, left - step * len(growing)
    extra = set(growing[:left])
    return {source: min(count, level) + (source in extra) for source, count in available.items()}


class _Candidates:
    """The rows that may still be in the sample: of each source those with the lowest digests."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._seen: Counter[str] = Counter()
        self._kept: list[pa.RecordBatch] = []
        self._held = 0
        self._next = 0

    def add(self, batch: pa.RecordBatch) -> None:
        for entry in pc.value_counts(batch["source"]).to_pylist():
            self._seen[entry["values"]] += entry["counts"]
        positions = pa.array(np.arange(self._next, self._next + batch.num_rows))
        self._next += batch.num_rows
        self._kept.append(batch.append_column("position", positions))
        self._held += batch.num_rows
        if self._held > 2 * self._rows + BATCH_ROWS:
            self._prune()

    def settle(self) -> Iterator[pa.RecordBatch]:
        """Yields the sample."""
        if self._kept:
            self._prune()
            table = pa.Table.from_batches(self._kept).sort_by("position").drop_columns("position")
            yield from table.combine_chunks().to_batches(BATCH_ROWS)

    def _prune(self) -> None:
        """Keeps each source's share of what was seen so far; a share never grows when more is seen."""
        table = pa.Table.from_batches(self._kept).combine_chunks()
        words = leading_words(table["id"])
        sources = np.asarray(table["source"].combine_chunks().dictionary_encode().indices)
        names = table["source"].combine_chunks().dictionary_encode().dictionary.to_pylist()
        shares = quotas(self._seen, self._rows)
        order = np.lexsort((words, sources))
        starts = np.searchsorted(sources[order], np.arange(len(names) + 1))
        kept = [
            order[start : min(start + shares[name], end)]
            for name, start, end in zip(names, starts[:-1], starts[1:], strict=True)
        ]
        self._kept = table.take(pa.array(np.concatenate(kept))).to_batches()
        self._held = sum(batch.num_rows for batch in self._kept)
