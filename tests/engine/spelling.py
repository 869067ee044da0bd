"""Requests of a scheduler without an engine: a test says which slot takes which token."""

from collections.abc import Iterable
from typing import Any

from sharegpt4v.dialogue import Completion, Request, Turn
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.scheduler import Scheduler

ENDLESS = 10**6


class Spelling:
    """Runs in a slot: its answer is its tokens, complete after so many."""

    def __init__(self, handle: Handle, length: int = ENDLESS) -> None:
        self.handle, self.length = handle, length
        self.tokens: list[int] = []

    @property
    def position(self) -> int:
        return len(self.tokens) - 1

    def take(self, token: int) -> Completion | None:
        self.tokens.append(token)
        if token < 0:
            raise ValueError("no such token")
        done = len(self.tokens) == self.length
        return Completion("".join(map(str, self.tokens)), self.length, "length") if done else None


def request(key: str) -> Request:
    return Request(key, (Turn("user", "?"),))


def submit(scheduler: Scheduler[Any], keys: Iterable[str]) -> dict[str, Handle]:
    return {key: scheduler.submit(request(key)) for key in keys}


def admit(scheduler: Scheduler[Any], length: int = ENDLESS) -> dict[int, str]:
    """Receives, and places all that is admitted; their ids by slot."""
    scheduler.receive()
    admitted = scheduler.admit()
    for slot, handle in admitted.items():
        scheduler.place(slot, Spelling(handle, length))
    return {slot: handle.request.id for slot, handle in admitted.items()}


def running(scheduler: Scheduler[Any]) -> dict[int, str]:
    return {slot: running.handle.request.id for slot, running in scheduler.running.items()}
