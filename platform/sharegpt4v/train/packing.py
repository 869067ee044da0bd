"""Spreads the samples of one optimizer step over workers and micro-steps, as packed rows or padded ones."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sharegpt4v.errors import UserError

Row = list[int]
"""Positions in the global batch of the samples of one row."""


@dataclass(frozen=True, slots=True)
class Plan:
    """rows[worker][micro_step]. Every worker has as many; an empty row is filled with one without a label.

    balance: mean tokens of a row, its padding counted, over those of the fullest: 1 when no worker waits.
    """

    rows: list[list[Row]]
    balance: float

    @property
    def micro_steps(self) -> int:
        return len(self.rows[0])


def plan_step(lengths: Sequence[int], workers: int, budget: int) -> Plan:
    """Spreads samples of these lengths (tokens), the largest first, each into the emptiest row.

    budget: tokens of a row. The number of micro-steps is the smallest for which every row keeps to it.
    Equal inputs give equal plans, so every worker computes the plan by itself.
    Raises UserError for a sample over the budget, and for fewer samples than workers.
    """
    _check(lengths, workers, budget)
    micro_steps = max(1, math.ceil(sum(lengths) / (workers * budget)))
    while True:
        rows = _spread(lengths, workers * micro_steps)
        filled = [sum(lengths[i] for i in row) for row in rows]
        if max(filled) <= budget:
            break
        micro_steps += 1
    return _laid_out(rows, filled, workers)


def plan_padded(lengths: Sequence[int], pictured: Sequence[bool], workers: int, budget: int) -> Plan:
    """Groups samples by modality and length as the released code does, for rows that are padded.

    pictured: which samples show an image; a row has only such or none. A row takes samples in the order of
    their lengths while it keeps to the budget, padded to its longest one: the released rows have a fixed
    number of samples, which wastes more. Raises UserError as plan_step does.
    """
    _check(lengths, workers, budget)
    rows: list[Row] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (pictured[i], -lengths[i], i)):
        last = rows[-1] if rows else []
        if last and pictured[last[0]] == pictured[sample] and lengths[last[0]] * (len(last) + 1) <= budget:
            last.append(sample)
        else:
            rows.append([sample])
    while len(rows) % workers:  # every worker runs as many: the largest rows are halved
        divisible = [row for row in rows if len(row) > 1]
        largest = max(divisible, key=lambda row: lengths[row[0]] * len(row), default=[])
        half = (len(largest) + 1) // 2
        rows.append(largest[half:])
        del largest[half:]
    return _laid_out(rows, [lengths[row[0]] * len(row) if row else 0 for row in rows], workers)


def _check(lengths: Sequence[int], workers: int, budget: int) -> None:
    if len(lengths) < workers:
        raise UserError(
            f"{len(lengths)} is refused: {workers} workers need a sample each", field="batch_size"
        )
    longest = max(lengths)
    if longest > budget:
        raise UserError(
            f"{budget} is refused: a sample has {longest} tokens; raise it, or lower `max_length`",
            field="tokens_per_micro_step",
        )


def _laid_out(rows: list[Row], filled: list[int], workers: int) -> Plan:
    """Gives a row to each worker in turn: the fullest rows run at the same time. filled: tokens of each."""
    micro_steps = len(rows) // workers
    by_size = sorted(range(len(rows)), key=lambda row: (-filled[row], rows[row]))
    grid = [[rows[by_size[m * workers + w]] for m in range(micro_steps)] for w in range(workers)]
    waited = sum(max(filled[by_size[m * workers + w]] for w in range(workers)) for m in range(micro_steps))
    return Plan(grid, sum(filled) / (workers * waited))


def _spread(lengths: Sequence[int], count: int) -> list[Row]:
    rows: list[Row] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, row = heapq.heappop(heap)
        rows[row].append(sample)
        heapq.heappush(heap, (tokens + lengths[sample], row))
    return rows
