"""However an engine's thread ends, nobody is left waiting for it."""

from typing import Any

import pytest

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.engine.handle import EngineClosed
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.worker import run_until_closed, start_thread


def _request(key: str) -> Request:
    return Request(key, (Turn("user", "?"),))


def test_an_error_of_the_engine_itself_ends_all_requests_and_says_why() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = [scheduler.submit(_request(key)) for key in "abcd"]

    def step() -> None:
        scheduler.receive()
        scheduler.admit()
        raise RuntimeError("cannot go on")

    thread = start_thread("test-engine", lambda: run_until_closed(scheduler, step))
    for handle in handles:
        with pytest.raises(EngineClosed, match="the engine ended: RuntimeError: cannot go on"):
            handle.result(10)
    thread.join(10)
    with pytest.raises(EngineClosed):
        scheduler.submit(_request("e"))


def test_closing_ends_the_thread_and_what_it_holds() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)

    def step() -> None:
        scheduler.receive()
        scheduler.admit()

    handle = scheduler.submit(_request("a"))
    thread = start_thread("test-engine", lambda: run_until_closed(scheduler, step))
    scheduler.close()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(EngineClosed, match="the engine was closed before this request was finished"):
        handle.result(0)
