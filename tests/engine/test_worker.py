"""However an engine's thread ends, nobody is left waiting for it."""

import gc
import os
import subprocess
import sys
import weakref
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


LEAVE = """
import numpy as np
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.build import EngineSpec, build_engine
folder = "platform/sharegpt4v/toy/checkpoints/captioner"
engine = build_engine(EngineSpec("torch", "toy@0", folder, capacity=8))
long = SamplingParams(max_new_tokens=900, min_new_tokens=900)
turns = (Turn("user", "?", (np.zeros((48, 48, 3), np.uint8),)),)
handles = [engine.submit(Request(f"r{n}", turns, long, stream=True)) for n in range(16)]
pieces = iter(handles[0])
next(pieces)
{then}
print("left", handles[1].done())
"""


@pytest.mark.parametrize(("then", "code"), [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_python_that_leaves_without_closing_ends_as_it_says(then: str, code: int) -> None:
    """It aborted with 134: the thread came back from a decode step into an interpreter that was gone."""
    command = [sys.executable, "-c", LEAVE.replace("{then}", then)]
    env = {**os.environ, "PYTHONPATH": "platform:."}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "terminate called" not in done.stderr
    assert done.stdout == ("left False\n" if not then else "")


def test_an_engine_that_ended_is_not_kept_for_the_end_of_python() -> None:
    def ended() -> weakref.ref[Scheduler[Any]]:
        scheduler: Scheduler[Any] = Scheduler(slots=1)
        thread = start_thread("test-engine", lambda: run_until_closed(scheduler, scheduler.receive))
        scheduler.close()
        thread.join(10)
        return weakref.ref(scheduler)

    kept = ended()
    gc.collect()
    assert kept() is None
