"""The order of samples: a pure function of data, weights, seed and epoch, for any number of workers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass
class SampleOrder:
    """Step s takes places s * batch_size to (s + 1) * batch_size of the epochs written one after another.

    So the position in the data is the step. counts: records of each set, numbered one set after another.
    weights: share of each set that an epoch takes; a fraction is drawn anew each epoch.
    """

    counts: Sequence[int]
    weights: Sequence[float]
    seed: int
    batch_size: int
    _epochs: dict[int, Numbers] = field(default_factory=dict, repr=False)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        shares = zip(self.counts, self.weights, strict=True)
        return max(1, sum(round(count * weight) for count, weight in shares))

    def steps(self, epochs: float) -> int:
        """Returns the steps of so many epochs; the last one is filled from the epoch after."""
        return max(1, math.ceil(epochs * self.epoch_size / self.batch_size - 1e-9))

    def step(self, step: int) -> Numbers:
        """Returns the numbers of the samples of one step, (batch_size,) int64."""
        size, start = self.epoch_size, step * self.batch_size
        places = np.arange(start, start + self.batch_size)
        found = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(places // size):
            here = places // size == epoch
            found[here] = self._epoch(int(epoch))[places[here] % size]
        return found

    def _epoch(self, epoch: int) -> Numbers:
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = self._drawn(epoch)
        return self._epochs[epoch]

    def _drawn(self, epoch: int) -> Numbers:
        rng = np.random.default_rng([self.seed, epoch])
        chosen, first = [], 0
        for count, weight in zip(self.counts, self.weights, strict=True):
            wanted = round(count * weight)
            whole = np.tile(np.arange(count), wanted // count)
            rest = rng.permutation(count)[: wanted % count]
            chosen.append(first + np.concatenate([whole, rest]))
            first += count
        numbers = np.concatenate(chosen).astype(np.int64)
        return rng.permutation(numbers if len(numbers) else np.arange(1, dtype=np.int64))
