"""The one place that all workers of a session report to, in a process of its own: it outlives every worker.

Its jobs are separate classes: Suspects, RejectLimit, StorageFaults and Statistics.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.steps.reject_limit import RejectLimit
from pipelines.steps.statistics import Statistics
from pipelines.steps.storage_faults import NextStep, StorageFaults
from pipelines.steps.suspects import Admission, Suspects
from sharegpt4v.engine.stats import EngineStats


@dataclass(frozen=True, slots=True)
class Tally:
    """Images done in this session, and workers that died. reasons: rejects by reason. ready: workers whose
    engine is loaded. put_off: images whose storage failed; dead: why that ends the run."""

    captions: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    deaths: int = 0
    ready: int = 0
    stop: str | None = None
    put_off: int = 0
    dead: str | None = None

    @property
    def rejects(self) -> int:
        return sum(self.reasons.values())

    @property
    def done(self) -> int:
        return self.captions + self.rejects


class LedgerClient(Protocol):
    """How a step reaches the ledger: over Ray in a pipeline, directly in tests."""

    def ready(self, worker: str) -> None: ...

    def begin(self, worker: str, ids: Sequence[str]) -> Admission: ...

    def begin_alone(self, worker: str, key: str) -> None: ...

    def end(self, ids: Iterable[str]) -> None: ...

    def count(self, first: str, captions: int, reasons: dict[str, int], example: str = "") -> str | None: ...

    def put_off(self, key: str, message: str) -> NextStep: ...

    def give_up(self, cause: str) -> None: ...

    def report(self, worker: str, stats: EngineStats) -> None: ...


class Ledger:
    """A plain class; pipelines run one of it as a Ray actor without CPUs."""

    def __init__(self, max_reject_rate: float, captions: int = 0, rejects: int = 0) -> None:
        """Starts with the counts of earlier sessions, which are judged together with this one's."""
        self._suspects = Suspects()
        self._limit = RejectLimit(max_reject_rate, captions, rejects)
        self._faults = StorageFaults()
        self._statistics = Statistics()

    def ready(self, worker: str) -> None:
        """Notes that the engine of this worker is loaded."""
        self._statistics.ready.add(worker)

    def begin(self, worker: str, ids: Sequence[str]) -> Admission:
        """Asks before `ids` are worked on together."""
        return replace(self._suspects.begin(worker, ids), stop=self._limit.stop or self._faults.dead)

    def begin_alone(self, worker: str, key: str) -> None:
        """Marks a suspect that is about to be tried with nothing else in its process."""
        self._suspects.begin_alone(worker, key)

    def end(self, ids: Iterable[str]) -> None:
        """Clears images that came through."""
        self._suspects.end(ids)

    def count(self, first: str, captions: int, reasons: dict[str, int], example: str = "") -> str | None:
        """Adds finished images. Returns why the run must stop once too many of them are rejects.

        first: id of the first of them; who takes over a dead worker's block tells of its commits again.
        example: one of the rejects in words.
        """
        self._statistics.count(first, captions, reasons)
        self._limit.judge(self._statistics.captions, self._statistics.reasons, example)
        return self._limit.stop

    def put_off(self, key: str, message: str) -> NextStep:
        """Notes an image whose storage failed. Answers what to do: see StorageFaults.put_off."""
        return self._faults.put_off(key, message)

    def give_up(self, cause: str) -> None:
        """Ends the run because its storage is dead."""
        self._faults.give_up(cause)

    def begin_again(self) -> None:
        """Begins another pass, over the images that were put off."""
        self._faults.begin_again()

    def faults(self) -> dict[str, str]:
        """Returns what the storage answered of images that were put off, by id, of the first thousand."""
        return self._faults.messages

    def report(self, worker: str, stats: EngineStats) -> None:
        """Takes what the engine of this worker has done since it started."""
        self._statistics.report(worker, stats)

    def engines(self) -> EngineStats:
        """Sums what all engines of this session have done."""
        return self._statistics.engines()

    def tally(self) -> Tally:
        counts = self._statistics
        return Tally(
            counts.captions,
            dict(counts.reasons),
            deaths=self._suspects.deaths,
            ready=len(counts.ready),
            stop=self._limit.stop,
            put_off=self._faults.count,
            dead=self._faults.dead,
        )


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

    def ready(self, worker: str) -> None:
        _wait(self._actor.ready.remote(worker))

    def begin(self, worker: str, ids: Sequence[str]) -> Admission:
        admission = _wait(self._actor.begin.remote(worker, list(ids)))
        assert isinstance(admission, Admission)
        return admission

    def begin_alone(self, worker: str, key: str) -> None:
        _wait(self._actor.begin_alone.remote(worker, key))

    def end(self, ids: Iterable[str]) -> None:
        _wait(self._actor.end.remote(list(ids)))

    def count(self, first: str, captions: int, reasons: dict[str, int], example: str = "") -> str | None:
        stop: str | None = _wait(self._actor.count.remote(first, captions, reasons, example))
        return stop

    def put_off(self, key: str, message: str) -> NextStep:
        answer: NextStep = _wait(self._actor.put_off.remote(key, message))
        return answer

    def give_up(self, cause: str) -> None:
        _wait(self._actor.give_up.remote(cause))

    def begin_again(self) -> None:
        _wait(self._actor.begin_again.remote())

    def faults(self) -> dict[str, str]:
        messages: dict[str, str] = _wait(self._actor.faults.remote())
        return messages

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
    """Waits as ray.get does, but keeps the task's CPU: Ray would start one more worker on it."""
    return reference.future().result()
