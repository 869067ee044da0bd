"""The scheduler: who begins, who runs, who is tried again, and that every request ends once."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from sharegpt4v.dialogue import Completion, Request, Turn
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle
from sharegpt4v.engine.scheduler import Scheduler
from tests.commands import environment

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


def _request(key: str) -> Request:
    return Request(key, (Turn("user", "?"),))


def _submit(scheduler: Scheduler[Any], keys: Iterable[str]) -> dict[str, Handle]:
    return {key: scheduler.submit(_request(key)) for key in keys}


def _admit(scheduler: Scheduler[Any], length: int = ENDLESS) -> dict[int, str]:
    """Receives, and places all that is admitted; their ids by slot."""
    scheduler.receive()
    admitted = scheduler.admit()
    for slot, handle in admitted.items():
        scheduler.place(slot, Spelling(handle, length))
    return {slot: handle.request.id for slot, handle in admitted.items()}


def _running(scheduler: Scheduler[Any]) -> dict[int, str]:
    return {slot: running.handle.request.id for slot, running in scheduler.running.items()}


# Admission


def test_requests_begin_in_the_order_they_came_in() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=3)
    _submit(scheduler, "abcde")
    assert _admit(scheduler) == {0: "a", 1: "b", 2: "c"}
    assert _admit(scheduler) == {}


def test_a_free_slot_is_refilled_while_the_others_go_on() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=3)
    handles = _submit(scheduler, "abcd")
    _admit(scheduler, length=2)
    scheduler.take(1, 5)
    scheduler.take(1, 6)
    assert handles["b"].result(0) == Completion("56", 2, "length")
    assert _admit(scheduler) == {1: "d"}
    assert _running(scheduler) == {0: "a", 1: "d", 2: "c"}


def test_while_others_run_requests_wait_until_a_group_of_slots_is_free() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4, group=2)
    _submit(scheduler, "abcdefg")
    _admit(scheduler, length=1)
    scheduler.take(2, 0)
    assert _admit(scheduler) == {}
    scheduler.take(0, 0)
    assert _admit(scheduler) == {0: "e", 2: "f"}


def test_no_group_is_waited_for_when_fewer_requests_wait() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4, group=3)
    _submit(scheduler, "abcde")
    _admit(scheduler, length=1)
    scheduler.take(2, 0)
    assert _admit(scheduler) == {2: "e"}


def test_what_begins_keeps_its_slot_while_others_are_admitted() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    first = scheduler.submit(_request("a"))
    scheduler.receive()
    scheduler.admit()
    second = scheduler.submit(_request("b"))
    scheduler.receive()
    assert scheduler.admit() == {0: first, 1: second}


def test_what_begins_and_is_not_placed_keeps_its_slot_until_it_fails() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handles = _submit(scheduler, "ab")
    scheduler.receive()
    assert list(scheduler.admit()) == [0]
    scheduler.fail(0, ValueError("no room"))
    with pytest.raises(EngineError, match="ValueError: no room"):
        handles["a"].result(0)
    assert _admit(scheduler) == {0: "b"}


def test_receiving_waits_for_a_first_request() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    threading.Timer(0.05, scheduler.submit, [_request("a")]).start()
    assert _admit(scheduler) == {0: "a"}


def test_receiving_does_not_wait_while_something_runs() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    _submit(scheduler, "a")
    _admit(scheduler)
    scheduler.receive()  # would not return


# Cancelled and expired requests


def test_asking_whether_a_request_is_expired_does_nothing_to_it() -> None:
    handle = Handle(replace(_request("a"), timeout=0.0))
    time.sleep(0.001)
    assert handle.expired and not handle.done()
    assert not Handle(replace(_request("a"), timeout=60.0)).expired
    assert not Handle(_request("a")).expired


@pytest.mark.parametrize("where", ["waiting", "suspects", "beginning", "running"])
def test_a_sweep_ends_cancelled_and_expired_requests_wherever_they_are(where: str) -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=3)
    handles = [scheduler.submit(replace(_request(key), timeout=60.0)) for key in ("stay", "gone", "late")]
    scheduler.receive()
    tokens = 0
    if where == "beginning":
        scheduler.admit()
    if where in ("running", "suspects"):
        _admit(scheduler)
    if where == "running":
        for slot in (0, 1, 2):
            scheduler.take(slot, 7)
        tokens = 1
    if where == "suspects":
        scheduler.suspect(RuntimeError("a bad step"))
    stay, gone, late = handles
    gone.cancel()
    late.submitted -= 120
    scheduler.sweep()
    assert gone.result(0) == Completion("", tokens, "cancelled")
    with pytest.raises(EngineError, match=f"not finished within its 60 s, after {tokens} tokens"):
        late.result(0)
    assert not stay.done()
    stats = scheduler.stats()
    assert stats.failed == 1
    assert stats.queued == (where in ("waiting", "suspects")) and stats.running == (where == "running")


def test_requests_are_swept_while_others_run_and_wait() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handles = _submit(scheduler, "ab")
    _admit(scheduler)
    handles["b"].cancel()
    end = time.monotonic() + 5
    while not handles["b"].done() and time.monotonic() < end:
        scheduler.receive()
    assert handles["b"].result(0).finish_reason == "cancelled"
    assert not handles["a"].done()


def test_a_request_cancelled_before_it_begins_takes_no_slot() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = _submit(scheduler, "ab")
    scheduler.receive()
    handles["a"].cancel()
    assert [handle.request.id for handle in scheduler.admit().values()] == ["b"]
    assert handles["a"].result(0) == Completion("", 0, "cancelled")


def test_a_cancelled_running_request_ends_with_its_next_token() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handles = _submit(scheduler, "ab")
    _admit(scheduler, length=2)
    scheduler.take(0, 7)
    handles["a"].cancel()
    scheduler.take(0, 7)
    assert handles["a"].result(0) == Completion("", 2, "cancelled")
    assert _admit(scheduler) == {0: "b"}


def test_a_running_request_whose_time_is_over_fails_with_its_next_token() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handle = scheduler.submit(replace(_request("a"), timeout=0.2))
    _admit(scheduler)
    scheduler.take(0, 7)
    handle.submitted -= 1
    scheduler.take(0, 7)
    with pytest.raises(EngineError, match=r"not finished within its 0.2 s, after 2 tokens"):
        handle.result(0)
    assert scheduler.running == {}


def test_a_timeout_that_is_no_number_fails_its_request_alone() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    wrong = scheduler.submit(replace(_request("a"), timeout="5"))  # type: ignore[arg-type]
    scheduler.submit(_request("b"))
    assert list(_admit(scheduler).values()) == ["b"]
    with pytest.raises(EngineError, match="not supported between"):
        wrong.result(0)


# Tokens


def test_a_token_that_cannot_be_taken_fails_its_request_alone() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = _submit(scheduler, "ab")
    _admit(scheduler)
    scheduler.take(0, -1)
    scheduler.take(1, 1)
    with pytest.raises(EngineError, match="ValueError: no such token"):
        handles["a"].result(0)
    assert _running(scheduler) == {1: "b"}


def test_slots_are_compacted_only_when_nothing_waits_for_them() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=6, group=4)
    _submit(scheduler, "abcdefghij")
    _admit(scheduler, length=1)
    for slot in (0, 2, 5):
        scheduler.take(slot, 0)
    assert scheduler.compact_slots() == []  # they are given away as soon as there are four
    scheduler.take(3, 0)
    assert _admit(scheduler, length=1) == {0: "g", 2: "h", 3: "i", 5: "j"}
    for slot in (0, 3, 4):
        scheduler.take(slot, 0)
    assert scheduler.compact_slots() == [(5, 0)]
    assert _running(scheduler) == {0: "j", 1: "b", 2: "h"}
    assert scheduler.compact_slots() == []


# Failed steps


@pytest.mark.parametrize(
    ("fault", "expected"), [("c", ["abcd", "ab", "cd", "c", "d"]), ("a", ["abcd", "ab", "a", "b", "cd"])]
)
def test_suspects_are_tried_by_halves_until_the_one_at_fault_is_alone(
    fault: str, expected: list[str]
) -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4)
    handles = _submit(scheduler, "abcd")
    groups = []
    while not all(handle.done() for handle in handles.values()):
        group = _admit(scheduler, length=1)
        groups.append("".join(group.values()))
        if fault in groups[-1]:
            scheduler.suspect(RuntimeError("a bad step"))
        else:
            for slot in group:
                scheduler.take(slot, 1)
    assert groups == expected
    with pytest.raises(EngineError, match="RuntimeError: a bad step"):
        handles.pop(fault).result(0)
    assert [handle.result(0).text for handle in handles.values()] == ["1", "1", "1"]
    stats = scheduler.stats()
    assert (stats.requests, stats.failed, stats.running, stats.queued) == (3, 1, 0, 0)


def test_suspects_run_with_no_other_beside_them() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4)
    _submit(scheduler, "abcd")
    _admit(scheduler, length=1)
    scheduler.suspect(RuntimeError("a bad step"))
    _submit(scheduler, "ef")
    assert _admit(scheduler, length=1) == {0: "a", 1: "b"}
    scheduler.take(0, 1)
    assert _admit(scheduler) == {}
    scheduler.take(1, 1)
    assert _admit(scheduler, length=1) == {0: "c", 1: "d"}


def test_requests_that_begin_are_suspects_too() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    _submit(scheduler, "ab")
    _admit(scheduler, length=1)
    scheduler.take(0, 1)
    _submit(scheduler, "c")
    scheduler.receive()
    assert list(scheduler.admit()) == [0]
    scheduler.suspect(RuntimeError("a bad prefill"))
    assert _admit(scheduler, length=1) == {0: "b"}
    scheduler.take(0, 1)
    assert _admit(scheduler) == {0: "c"}


@pytest.mark.parametrize("how", ["suspect", "fail", "take"])
def test_an_error_that_concerns_all_is_raised_and_blames_nobody(how: str) -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2, concerns_all=lambda error: isinstance(error, ValueError))
    handles = _submit(scheduler, "ab")
    _admit(scheduler)
    report: dict[str, Callable[[], None]] = {
        "suspect": lambda: scheduler.suspect(ValueError("no such token")),
        "fail": lambda: scheduler.fail(0, ValueError("no such token")),
        "take": lambda: scheduler.take(0, -1),
    }
    with pytest.raises(ValueError, match="no such token"):
        report[how]()
    assert not any(handle.done() for handle in handles.values())


def test_a_step_that_fails_without_requests_raises_its_error() -> None:
    with pytest.raises(RuntimeError, match="a bad step"):
        Scheduler(slots=2).suspect(RuntimeError("a bad step"))


def test_after_a_restart_all_begin_again_in_their_order() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4)
    _submit(scheduler, "abcd")
    _admit(scheduler)
    scheduler.suspect(RuntimeError("a bad step"))
    _submit(scheduler, "ef")
    assert _admit(scheduler) == {0: "a", 1: "b"}
    scheduler.restart(slots=3, group=1)
    assert scheduler.stats().slots == 3 and scheduler.stats().queued == 6
    assert _admit(scheduler, length=1) == {0: "a", 1: "b", 2: "c"}
    for slot in (0, 1, 2):
        scheduler.take(slot, 1)
    assert _admit(scheduler) == {0: "d", 1: "e", 2: "f"}


# The end


def test_nobody_is_left_waiting_when_an_engine_ends() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = _submit(scheduler, "abcd")
    _admit(scheduler)  # c and d wait
    scheduler.suspect(RuntimeError("a bad step"))
    _admit(scheduler)  # a runs, b is a suspect
    handles |= _submit(scheduler, "e")  # not received
    scheduler.abandon("the power is off")
    for key, handle in handles.items():
        with pytest.raises(EngineClosed, match="was closed" if key == "e" else "the power is off"):
            handle.result(0)
    with pytest.raises(EngineClosed, match="the engine is closed"):
        scheduler.submit(_request("f"))


def test_closing_wakes_who_waits_for_a_request() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    threading.Timer(0.05, scheduler.close).start()
    scheduler.receive()
    scheduler.wait_closed()
    assert scheduler.closed


def test_requests_from_many_threads_all_end_when_the_engine_is_closed_meanwhile() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4)
    ends: list[str] = []

    def ask() -> None:
        for number in range(50):
            try:
                scheduler.submit(_request(str(number))).result(20)
                ends.append("answered")
            except EngineClosed:
                ends.append("closed")

    def work() -> None:
        while not scheduler.closed:
            for slot in _admit(scheduler, length=1):
                scheduler.take(slot, 1)
            if len(ends) > 100:
                scheduler.close()
        scheduler.abandon("closed")

    threads = [threading.Thread(target=target) for target in (work, *[ask] * 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(ends) == 8 * 50 and set(ends) == {"answered", "closed"}


def test_what_runs_and_what_waits_is_counted() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    _submit(scheduler, "abc")
    _admit(scheduler)
    _submit(scheduler, "de")
    stats = scheduler.stats()
    assert (stats.running, stats.queued, stats.slots) == (2, 3, 2)


def test_scheduling_needs_no_torch() -> None:
    code = "import sys, sharegpt4v.engine.scheduler\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
