"""What a session has done so far: images by outcome, and the work of its engines."""

from collections import Counter
from collections.abc import Mapping

from sharegpt4v.engine.stats import EngineStats


class Statistics:
    """Counts of one session."""

    def __init__(self) -> None:
        self._counted: set[str] = set()
        self.captions = 0
        self.reasons: Counter[str] = Counter()
        """Rejects by reason."""
        self.ready: set[str] = set()
        """Workers whose engine is loaded."""
        self._engines: dict[str, EngineStats] = {}  # worker -> what its engine did so far

    def count(self, first: str, captions: int, reasons: Mapping[str, int]) -> None:
        """Adds finished images, once for each first id."""
        if first in self._counted:
            return
        self._counted.add(first)
        self.captions += captions
        self.reasons.update(reasons)

    def report(self, worker: str, stats: EngineStats) -> None:
        """Takes what the engine of this worker has done since it started.

        Reports may arrive in another order than they were sent: an older one changes nothing.
        """
        if stats.requests >= self._engines.get(worker, stats).requests:
            self._engines[worker] = stats

    def engines(self) -> EngineStats:
        """Sums over all engines of this session, those of dead workers up to their last report."""
        return sum(self._engines.values(), EngineStats())
