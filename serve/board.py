"""The board: where replicas report, keys are counted over all of them, and news are passed on."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from serve.affinity import News, Places
from serve.errors import ApiError
from serve.limits import Admission, Limits, Ticket
from serve.model import Snapshot

FORGET_SECONDS = 10.0
"""After which a replica that no longer reports is forgotten: it ended, or hangs. It reports every second."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself. in_flight: requests in its API. api: what its API counts.

    dialogues: those it has answered since its last report, see serve/affinity.py.
    """

    snapshot: Snapshot
    in_flight: int = 0
    api: list[Any] = field(default_factory=list)
    dialogues: tuple[str, ...] = ()


class Board:
    """Keeps the last report of every replica, and counts the requests of each key over all of them."""

    def __init__(self, limits: Limits) -> None:
        self._last: dict[str, tuple[float, Report]] = {}
        self._draining = False
        self._keys = Admission(Limits(in_flight=2**31, per_key=limits.per_key, per_minute=limits.per_minute))
        self._held: dict[str, dict[int, Ticket]] = defaultdict(dict)  # by replica and number
        self._number = 0
        self._places = Places()

    async def report(self, report: Report) -> News:
        """Takes a report; returns what is new for this replica."""
        replica = report.snapshot.replica
        self._last[replica] = (time.monotonic(), report)
        queued = {name: one.snapshot.stats.queued for name, (_, one) in self._last.items()}
        return News(self._draining, self._places.exchange(replica, report.dialogues), queued)

    async def reports(self) -> list[Report]:
        """Returns the reports of replicas that still report, and gives back what the others held."""
        oldest = time.monotonic() - FORGET_SECONDS
        for replica, (at, _) in list(self._last.items()):
            if at < oldest:
                del self._last[replica]
                self._places.forget(replica)
                for ticket in self._held.pop(replica, {}).values():
                    self._keys.leave(ticket)
        return [report for _, report in self._last.values()]

    async def drain(self) -> None:
        """Has every replica refuse requests, within a second."""
        self._draining = True

    async def admit(self, replica: str, key: str) -> int | ApiError:
        """Counts a request of a key; returns its number, or the error when it is one too many."""
        await self.reports()
        try:
            ticket = self._keys.enter(key)
        except ApiError as error:
            return error
        self._number += 1
        self._held[replica][self._number] = ticket
        return self._number

    async def leave(self, replica: str, number: int) -> None:
        """Gives back what `admit` counted."""
        if ticket := self._held[replica].pop(number, None):
            self._keys.leave(ticket)
