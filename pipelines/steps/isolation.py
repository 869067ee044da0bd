"""Works through a batch so that an image which kills its process is found out and set aside."""

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipelines.steps.ledger import LedgerClient
from sharegpt4v.errors import RunFailed

KILLED_WORKER = "killed_worker"
KILLED_WORKER_MESSAGE = "its process died each time this image was in progress, twice with nothing else in it"


class RunStopped(RunFailed):
    """The ledger asked for the end of the run; its message says why."""


class Isolation:
    """One per process and stage. Several threads may use it at once."""

    def __init__(self, ledger: LedgerClient, stage: str) -> None:
        self._ledger = ledger
        self._stage = stage
        self.worker = f"{stage}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._room = ReadersWriterLock()

    def run(self, ids: Sequence[str], work: Callable[[list[int]], None]) -> list[int]:
        """Calls `work` with positions in `ids`: the unsuspected together, then each suspect alone.

        Returns the positions of quarantined images, which `work` never saw.
        Raises RunStopped when the ledger wants the run to end.
        """
        keys = [f"{self._stage}:{key}" for key in ids]
        # Begun inside the room: what waits at the door while a suspect is tried must not die as its company.
        with self._room.shared():
            admission = self._ledger.begin(self.worker, keys)
            if admission.stop:
                raise RunStopped(admission.stop)
            apart = admission.suspects | admission.quarantined
            free = [position for position, key in enumerate(keys) if key not in apart]
            if free:
                work(free)
            self._ledger.end([keys[position] for position in free])
        for position, key in enumerate(keys):
            if key in admission.suspects:
                with self._room.alone():
                    self._ledger.begin_alone(self.worker, key)
                    work([position])
                    self._ledger.end([key])
        return [position for position, key in enumerate(keys) if key in admission.quarantined]


class ReadersWriterLock:
    """Many may share it, or one be alone in it: a lone suspect must have its process to itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._occupied = False  # by one alone
        self._waiting = 0  # to be alone; newcomers let them go first

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._occupied and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._occupied and not self._inside)
            self._waiting -= 1
            self._occupied = True
        try:
            yield
        finally:
            with self._changed:
                self._occupied = False
                self._changed.notify_all()
