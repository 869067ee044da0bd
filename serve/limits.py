"""What one request, one key and all of them together may take; counted in one process, before any body."""

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve.errors import ApiError, overloaded, unavailable


@dataclass(frozen=True, slots=True)
class Limits:
    """in_flight: requests in progress at once. per_key: those of one key. per_minute: new ones of one key.

    body_bytes: of one request; body_seconds: in which it must have arrived. pixels: of one image.
    images: of one dialogue; batch: of one request for captions. tokens: of one answer.
    request_seconds: after which an answer that is not finished fails. 0 means no limit for per_key and
    per_minute.
    """

    in_flight: int = 64
    per_key: int = 0
    per_minute: int = 0
    body_bytes: int = 20_000_000
    body_seconds: float = 30.0
    pixels: int = 40_000_000
    images: int = 8
    batch: int = 64
    tokens: int = 2048
    request_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that is counted."""

    key: str


class Admission:
    """Counts requests in progress and lets further ones in, or refuses them with 429 or 503."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.draining = False
        self.in_flight = 0
        self._by_key: dict[str, int] = defaultdict(int)
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, and when that was counted

    @asynccontextmanager
    async def admitted(self, key: str) -> AsyncIterator[None]:
        """Counts a request of this key while the block lasts. Raises ApiError when it is one too many."""
        ticket = self.enter(key)
        try:
            yield
        finally:
            self.leave(ticket)

    def enter(self, key: str) -> Ticket:
        """Counts a request of this key until `leave`. Raises ApiError when it is one too many."""
        if self.draining:
            raise unavailable()
        if self.in_flight >= self.limits.in_flight:
            raise overloaded()
        if self.limits.per_key and self._by_key[key] >= self.limits.per_key:
            raise ApiError(
                429,
                f"this key has {self.limits.per_key} requests in progress, its limit",
                code="concurrency_limit_exceeded",
                retry_after=1,
            )
        self._take_token(key)
        self.in_flight += 1
        self._by_key[key] += 1
        return Ticket(key)

    def leave(self, ticket: Ticket) -> None:
        self.in_flight -= 1
        self._by_key[ticket.key] -= 1
        if not self._by_key[ticket.key]:
            del self._by_key[ticket.key]

    def _take_token(self, key: str) -> None:
        """Takes one request of the key's minute; the bucket fills evenly, so that bursts end in waiting."""
        most = self.limits.per_minute
        if not most:
            return
        now = time.monotonic()
        left, counted = self._buckets.get(key, (float(most), now))
        left = min(most, left + (now - counted) * most / 60)
        if left < 1:
            self._buckets[key] = left, now
            raise ApiError(
                429,
                f"this key may send {most} requests a minute",
                code="rate_limit_exceeded",
                retry_after=(1 - left) * 60 / most,
            )
        self._buckets[key] = left - 1, now
