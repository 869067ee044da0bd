"""Records which images were in progress when a process died, to set aside one that kills its process.

Ray starts a dead worker again and repeats its calls, for ever. The images that a dead process had in progress
are suspects and are tried alone; one that kills its process alone, twice, is quarantined.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONE_TRIES = 2
"""Times a suspect is tried alone before it is quarantined."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Answer to `begin`: suspects must be tried alone, quarantined not at all; stop ends the run."""

    suspects: frozenset[str] = frozenset()
    quarantined: frozenset[str] = frozenset()
    stop: str | None = None


class Suspects:
    """Records what each worker has in progress. `worker` is a token that lives as long as its process."""

    def __init__(self) -> None:
        self.deaths = 0
        """Workers that died with images in progress."""
        self._holder: dict[str, str] = {}  # image id -> worker that has it in progress
        self._alone: dict[str, str] = {}  # image id -> worker that tries it alone
        self._suspects: set[str] = set()
        self._lone_deaths: dict[str, int] = {}
        self._dead: set[str] = set()

    def begin(self, worker: str, ids: Sequence[str]) -> Admission:
        """Notes that `ids` are about to be worked on together. Ids that another worker holds mean it died."""
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
        return Admission(frozenset(suspects), frozenset(quarantined))

    def begin_alone(self, worker: str, key: str) -> None:
        """Marks a suspect that is about to be tried with nothing else in its process."""
        self._holder[key] = self._alone[key] = worker

    def end(self, ids: Iterable[str]) -> None:
        """Clears images that came through: nothing is held against them any more."""
        for key in ids:
            self._holder.pop(key, None)
            self._alone.pop(key, None)
            self._suspects.discard(key)
            self._lone_deaths.pop(key, None)

    def _record_death(self, key: str, holder: str) -> None:
        if holder not in self._dead:
            self._dead.add(holder)
            self.deaths += 1
        if self._alone.get(key) == holder:
            self._lone_deaths[key] = self._lone_deaths.get(key, 0) + 1
        self._suspects.add(key)
        self._holder.pop(key, None)
        self._alone.pop(key, None)
