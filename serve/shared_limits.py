"""Admission for several replicas: each counts its own requests in progress, the board those of a key."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from serve.errors import ApiError
from serve.limits import Admission, Limits

_BOARD_SECONDS = 1.0
"""How long the board may take. Without its answer a request is let in: a lost board must not stop all."""

_NOTE_SECONDS = 60.0
"""From one line of the log about a board that does not answer to the next."""

log = logging.getLogger("serve.limits")


class SharedAdmission(Admission):
    """Asks the board about keys, when keys have limits; the rest is counted here, and first."""

    def __init__(self, limits: Limits, board: Any, replica: str = "") -> None:
        super().__init__(replace(limits, per_key=0, per_minute=0))
        self._board, self._replica = board, replica
        self._by_board = bool(limits.per_key or limits.per_minute)
        self._noted = -_NOTE_SECONDS

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

    def _note(self, error: Exception) -> None:
        """Logs once a minute that limits of keys are not held."""
        now = time.monotonic()
        if now - self._noted > _NOTE_SECONDS:
            self._noted = now
            log.warning("the board does not answer: limits of keys are not held", exc_info=error)

    async def _ask(self, key: str) -> int | None:
        async def result() -> Any:
            return await self._board.admit.remote(self._replica, key)

        try:
            answer = await asyncio.wait_for(result(), _BOARD_SECONDS)
        except Exception as error:
            self._note(error)
            return None
        if isinstance(answer, ApiError):
            raise answer
        return int(answer)
