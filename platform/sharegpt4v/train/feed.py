"""Prepares the steps of one worker ahead of time: encode the global batch, plan it, decode the own share.

Every worker encodes the whole global batch and so computes the same plan without asking another; it decodes
only its own images. Nothing is tokenised before its step. Its threads do it: actors of Ray Data took a
quarter more CPU time a sample and 14 s to begin, and one GPU needs a fourteenth of what the threads prepare
(benchmarks/README.md).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from sharegpt4v.errors import Rejected, RunFailed
from sharegpt4v.train.collate import PackedRow, Sample, pack, pad, without_labels
from sharegpt4v.train.order import SampleOrder
from sharegpt4v.train.packing import Plan, plan_padded, plan_step
from sharegpt4v.train.samples import Encoded, SampleMaker

_AHEAD = 3
"""Steps prepared while one trains; a step of 128 images at 336 px takes 43 MB of pixels over all workers."""

_TRIES = 64
"""Records tried in place of one that cannot be used."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that was replaced: its id, the reason and a line for people."""

    id: str
    reason: str
    message: str


@dataclass(slots=True)
class PreparedStep:
    """One worker's share of one step. samples: its samples, rows without a label left out.

    ids: of the records in its rows. balance: see packing.Plan. cut: samples that were cut at a turn's end.
    """

    step: int
    rows: list[PackedRow]
    ids: list[str]
    samples: int
    balance: float
    cut: int = 0
    rejects: list[Reject] = field(default_factory=list)


class Feed:
    """Context manager. worker, workers: whose share. budget: tokens of a row. threads: that prepare.

    padded: rows of one modality and of like length, padded, in place of packed ones.
    """

    def __init__(
        self,
        maker: SampleMaker,
        order: SampleOrder,
        *,
        worker: int,
        workers: int,
        budget: int,
        threads: int,
        padded: bool = False,
    ) -> None:
        self.maker, self.order, self.worker, self.workers = maker, order, worker, workers
        self._budget, self._padded = budget, padded
        self._steps = ThreadPoolExecutor(_AHEAD, "sharegpt4v-step")
        self._threads = ThreadPoolExecutor(threads, "sharegpt4v-decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._steps, self._threads):
            pool.shutdown(wait=False, cancel_futures=True)

    def steps(self, first: int, last: int) -> Iterator[PreparedStep]:
        """Yields steps first .. last - 1 in order; raises what their preparation raised."""
        pending: deque[Future[PreparedStep]] = deque()
        for step in range(first, last):
            pending.append(self._steps.submit(self.prepare, step))
            if len(pending) >= _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def prepare(self, step: int) -> PreparedStep:
        """Returns this worker's share of one step. Raises StorageError, and UserError from plan_step."""
        numbers = [int(number) for number in self.order.step(step)]
        rejects: list[Reject] = []
        encoded = [self._encode(number, rejects if self.worker == 0 else []) for number in numbers]
        plan = self._plan(encoded)
        join = pad if self._padded else pack
        own = plan.rows[self.worker]
        places = [place for row in own for place in row]
        decoded = self._threads.map(lambda p: self._decode(numbers[p], encoded[p], rejects), places)
        samples = dict(zip(places, decoded, strict=True))
        filler = min(encoded, key=lambda each: each.tokens)
        rows = [
            join([samples[place] for place in row])
            if row
            else pack([without_labels(Sample(filler.ids, self._any(filler)))])
            for row in own
        ]
        ids = [encoded[place].record.id for place in places]
        cut = sum(bool(encoded[place].cut) for place in places)
        return PreparedStep(step, rows, ids, len(places), plan.balance, cut, rejects)

    def _plan(self, encoded: Sequence[Encoded]) -> Plan:
        lengths = [each.tokens for each in encoded]
        if self._padded:
            pictured = [each.with_image for each in encoded]
            return plan_padded(lengths, pictured, self.workers, self._budget)
        return plan_step(lengths, self.workers, self._budget)

    def _encode(self, number: int, rejects: list[Reject]) -> Encoded:
        try:
            return self.maker.encode(number)
        except Rejected as error:
            rejects.append(self._reject(number, error))
        for other in self._others(number):
            try:
                return self.maker.encode(other)
            except Rejected:
                continue
        raise RunFailed(
            f"no sample of {_TRIES} could take the place of {self.maker.records[number].id}: the data do not "
            "fit the stage"
        )

    def _decode(self, number: int, encoded: Encoded, rejects: list[Reject]) -> Sample:
        """Decodes a sample, or one that is not longer in its place: the same for any number of workers."""
        try:
            return self.maker.decode(encoded)
        except Rejected as error:
            rejects.append(Reject(encoded.record.id, error.reason, error.message))
        shortest: Sample | None = None
        for other in self._others(number):
            try:
                sample = self.maker.decode(self.maker.encode(other))
            except Rejected:
                continue
            if len(sample.ids.input_ids) <= encoded.tokens:
                return sample
            if shortest is None or len(sample.ids.input_ids) < len(shortest.ids.input_ids):
                shortest = sample
        if shortest is None:
            raise RunFailed(
                f"no sample of {_TRIES} could take the place of {encoded.record.id}, whose image cannot be "
                "used: put `root` right"
            )
        return shortest

    def _others(self, number: int) -> list[int]:
        rng = np.random.default_rng([self.order.seed, number])
        return [int(other) for other in rng.integers(0, len(self.maker.records), _TRIES)]

    def _reject(self, number: int, error: Rejected) -> Reject:
        return Reject(self.maker.records[number].id, error.reason, error.message)

    def _any(self, encoded: Encoded) -> tuple[np.ndarray, ...]:
        side = self.maker.rules.image_size
        return (np.zeros((side, side, 3), np.uint8),) if encoded.with_image else ()
