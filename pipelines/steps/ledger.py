"""Which images are in work where, so that one that kills its process is found out and set aside.

Ray starts a dead worker again and repeats its calls, for ever. The ledger lives in a process of its own
and remembers what a dead process had in work: those images are suspects, and are tried alone. One that
kills its process alone, twice, is quarantined.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sharegpt4v.engine.stats import EngineStats

LONE_TRIES = 2
"""Times a suspect is tried alone before it is quarantined."""

FIRST_JUDGEMENT = 1_000
"""Images after which the share of rejects is judged."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Answer to `begin`: suspects must be tried alone, quarantined not at all; stop ends the run."""

    suspects: frozenset[str] = frozenset()
    quarantined: frozenset[str] = frozenset()
    stop: str | None = None


@dataclass(slots=True)
class Tally:
    """Images done in this session."""

    captions: int = 0
    rejects: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    deaths: int = 0
    stop: str | None = None


class LedgerClient(Protocol):
    """How a step reaches the ledger: over Ray in a pipeline, directly in tests."""

    def begin(self, worker: str, ids: Sequence[str]) -> Admission: ...

    def begin_alone(self, worker: str, key: str) -> None: ...

    def end(self, ids: Iterable[str]) -> None: ...

    def count(self, captions: int, reasons: dict[str, int], example: str = "") -> str | None: ...

    def report(self, worker: str, stats: EngineStats) -> None: ...


class Ledger:
    """A plain class; pipelines run one of it as a Ray actor without CPUs.

    A call names itself by a `worker` token that lives as long as its process.
    """

    def __init__(self, max_reject_rate: float, captions: int = 0, rejects: int = 0) -> None:
        """captions, rejects: of earlier sessions, which are judged together with this one's."""
        self._max_reject_rate = max_reject_rate
        self._earlier = captions + rejects
        self._earlier_rejects = rejects
        self._holder: dict[str, str] = {}  # image id -> worker that has it in work
        self._alone: dict[str, str] = {}  # image id -> worker that tries it alone
        self._suspects: set[str] = set()
        self._lone_deaths: dict[str, int] = {}
        self._tally = Tally()
        self._dead: set[str] = set()
        self._engines: dict[str, EngineStats] = {}  # worker -> what its engine did so far

    def begin(self, worker: str, ids: Sequence[str]) -> Admission:
        """Asks before `ids` are worked on together. Ids held by another worker mean that it died."""
        suspects, quarantined = set(), set()
        for key in ids:
            holder = self._holder.get(key)
            if holder is not None and holder != worker:
                self._record_death(key, holder)
            if self._lone_deaths.get(key, 0) >= LONE_TRIES:
                quarantined.add(key)
            elif key in self._suspects:
                suspects.add(key)
            else:
                self._holder[key] = worker
        return Admission(frozenset(suspects), frozenset(quarantined), self._tally.stop)

    def begin_alone(self, worker: str, key: str) -> None:
        """Marks a suspect that is about to be tried with nothing else in its process."""
        self._holder[key] = self._alone[key] = worker

    def end(self, ids: Iterable[str]) -> None:
        """These images came through: nothing is held against them any more."""
        for key in ids:
            self._holder.pop(key, None)
            self._alone.pop(key, None)
            self._suspects.discard(key)
            self._lone_deaths.pop(key, None)

    def count(self, captions: int, reasons: dict[str, int], example: str = "") -> str | None:
        """Adds finished images. Returns why the run must stop once too many of them are rejects.

        example: one of the rejects in words.
        """
        tally = self._tally
        tally.captions += captions
        for reason, count in reasons.items():
            tally.rejects += count
            tally.reasons[reason] = tally.reasons.get(reason, 0) + count
        done = self._earlier + tally.captions + tally.rejects
        rejects = self._earlier_rejects + tally.rejects
        if tally.stop is None and done >= FIRST_JUDGEMENT and rejects > self._max_reject_rate * done:
            worst = max(
                tally.reasons, key=lambda reason: tally.reasons[reason], default="in earlier sessions"
            )
            tally.stop = (
                f"{rejects:,} of the first {done:,} images were rejected ({rejects / done:.1%}, "
                f"--max-reject-rate is {self._max_reject_rate:.1%}), mostly as {worst}"
                f"{'; ' if example else ''}{example}"
            )
        return tally.stop

    def report(self, worker: str, stats: EngineStats) -> None:
        """What the engine of this worker has done since it started; a later call may overtake this one."""
        if stats.requests >= self._engines.get(worker, stats).requests:
            self._engines[worker] = stats

    def engines(self) -> EngineStats:
        """What all engines of this session have done, those of dead workers up to their last report."""
        return sum(self._engines.values(), EngineStats())

    def tally(self) -> Tally:
        return self._tally

    def _record_death(self, key: str, holder: str) -> None:
        if holder not in self._dead:
            self._dead.add(holder)
            self._tally.deaths += 1
        if self._alone.get(key) == holder:
            self._lone_deaths[key] = self._lone_deaths.get(key, 0) + 1
        self._suspects.add(key)
        self._holder.pop(key, None)
        self._alone.pop(key, None)


class RemoteLedger:
    """The ledger as a Ray actor, with its methods called and waited for as if it were here.

    `begin` must have arrived before the work starts, else a death at once leaves no suspect: every call
    waits for its answer.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls, max_reject_rate: float, captions: int = 0, rejects: int = 0) -> "RemoteLedger":
        """Takes no CPU, and lives on the driver's node where it can: with another node it would forget."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(Ledger).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
        )
        return cls(actor.remote(max_reject_rate, captions, rejects))

    def begin(self, worker: str, ids: Sequence[str]) -> Admission:
        admission = _wait(self._actor.begin.remote(worker, list(ids)))
        assert isinstance(admission, Admission)
        return admission

    def begin_alone(self, worker: str, key: str) -> None:
        _wait(self._actor.begin_alone.remote(worker, key))

    def end(self, ids: Iterable[str]) -> None:
        _wait(self._actor.end.remote(list(ids)))

    def count(self, captions: int, reasons: dict[str, int], example: str = "") -> str | None:
        stop: str | None = _wait(self._actor.count.remote(captions, reasons, example))
        return stop

    def report(self, worker: str, stats: EngineStats) -> None:
        _wait(self._actor.report.remote(worker, stats))

    def engines(self) -> EngineStats:
        stats = _wait(self._actor.engines.remote())
        assert isinstance(stats, EngineStats)
        return stats

    def tally(self) -> Tally:
        tally = _wait(self._actor.tally.remote())
        assert isinstance(tally, Tally)
        return tally


def _wait(reference: Any) -> Any:
    """As ray.get, but without giving the task's CPU back meanwhile: Ray would start one more worker on it."""
    return reference.future().result()
