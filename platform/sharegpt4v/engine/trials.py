"""Finds the request at fault for a failed step: its requests are tried again in halves."""

from collections import deque
from collections.abc import Iterable, Iterator

from sharegpt4v.engine.handle import Handle


class Trials:
    """Groups of suspects, of which one at a time is on trial.

    A group is cleared once each of its requests has taken a token in a step without the others; each further
    suspicion doubles that number, so that requests which fail only together are separated in the end.
    to_the_end: it is cleared when all of it have ended, for engines that cannot leave others out of a step.
    """

    def __init__(self, to_the_end: bool) -> None:
        self.to_the_end = to_the_end
        self._groups: deque[list[Handle]] = deque()
        self._tokens_left: dict[Handle, int] = {}  # of the group on trial

    def __bool__(self) -> bool:
        return bool(self._groups or self._tokens_left)

    def __iter__(self) -> Iterator[Handle]:
        """Yields the suspects that wait for their trial."""
        for group in self._groups:
            yield from group

    @property
    def waiting(self) -> int:
        """The number of suspects that wait for their trial."""
        return sum(map(len, self._groups))

    def on_trial(self, handle: Handle) -> bool:
        return handle in self._tokens_left

    def suspect(self, handles: list[Handle]) -> None:
        """Queues each half of the handles before all other groups."""
        for handle in handles:
            handle.suspicions += 1
            self._tokens_left.pop(handle, None)
        half = len(handles) // 2
        self._groups.extendleft(group for group in (handles[half:], handles[:half]) if group)

    def next_group(self, most: int) -> list[Handle]:
        """Puts the next group on trial and returns it; none while another one is, or for want of slots."""
        if self._tokens_left or not self._groups or len(self._groups[0]) > most:
            return []
        group = self._groups.popleft()
        self._tokens_left = {handle: 2 ** (handle.suspicions - 1) for handle in group}
        return group

    def took(self, handle: Handle) -> None:
        """Notes a token of a request."""
        if handle in self._tokens_left and not self.to_the_end:
            self._tokens_left[handle] -= 1
            if not self._tokens_left[handle]:
                del self._tokens_left[handle]

    def ended(self, handle: Handle) -> None:
        """Notes the end of a request that had a slot."""
        self._tokens_left.pop(handle, None)

    def keep(self, wanted: Iterable[Handle]) -> None:
        """Drops waiting suspects that are not among the wanted ones."""
        kept = set(wanted)
        groups = ([handle for handle in group if handle in kept] for group in self._groups)
        self._groups = deque(group for group in groups if group)

    def clear(self) -> None:
        self._groups.clear()
        self._tokens_left.clear()
