"""Admission for several replicas: each counts its own requests in progress, the board those of a key."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from serve.errors import ApiError
from serve.limits import Admission, Limits

_BOARD_SECONDS = 1.0
"""How long the board may take. Without its answer a request is let in: a lost board must not stop all."""


class SharedAdmission(Admission):
    """Asks the board about keys, when keys have limits; the rest is counted here, and first."""

    def __init__(self, limits: Limits, board: Any, replica: str = "") -> None:
        super().__init__(replace(limits, per_key=0, per_minute=0))
        self._board, self._replica = board, replica
        self._by_board = bool(limits.per_key or limits.per_minute)

    @asynccontextmanager
    async def admitted(self, key: str) -> AsyncIterator[None]:
        """Counts a request of this key while the block lasts. Raises ApiError when it is one too many."""
        async with super().admitted(key):
            number = await self._ask(key) if self._by_board else None
            try:
                yield
            finally:
                if number is not None:
                    self._board.leave.remote(self._replica, number)

    async def _ask(self, key: str) -> int | None:
        async def result() -> Any:
            return await self._board.admit.remote(self._replica, key)

        try:
            answer = await asyncio.wait_for(result(), _BOARD_SECONDS)
        except Exception:
            return None
        if isinstance(answer, ApiError):
            raise answer
        return int(answer)
