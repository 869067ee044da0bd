"""The scheduler: who begins, who runs, and that every request ends once."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from sharegpt4v.dialogue import Completion
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle
from sharegpt4v.engine.scheduler import Scheduler
from tests.commands import environment
from tests.engine.spelling import admit, request, running, submit

# Admission


def test_requests_begin_in_the_order_they_came_in() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=3)
    submit(scheduler, "abcde")
    assert admit(scheduler) == {0: "a", 1: "b", 2: "c"}
    assert admit(scheduler) == {}


def test_a_free_slot_is_refilled_while_the_others_go_on() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=3)
    handles = submit(scheduler, "abcd")
    admit(scheduler, length=2)
    scheduler.take(1, 5)
    scheduler.take(1, 6)
    assert handles["b"].result(0) == Completion("56", 2, "length")
    assert admit(scheduler) == {1: "d"}
    assert running(scheduler) == {0: "a", 1: "d", 2: "c"}


def test_while_others_run_requests_wait_until_a_group_of_slots_is_free() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4, group=2)
    submit(scheduler, "abcdefg")
    admit(scheduler, length=1)
    scheduler.take(2, 0)
    assert admit(scheduler) == {}
    scheduler.take(0, 0)
    assert admit(scheduler) == {0: "e", 2: "f"}


def test_no_group_is_waited_for_when_fewer_requests_wait() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4, group=3)
    submit(scheduler, "abcde")
    admit(scheduler, length=1)
    scheduler.take(2, 0)
    assert admit(scheduler) == {2: "e"}


def test_what_begins_keeps_its_slot_while_others_are_admitted() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    first = scheduler.submit(request("a"))
    scheduler.receive()
    scheduler.admit()
    second = scheduler.submit(request("b"))
    scheduler.receive()
    assert scheduler.admit() == {0: first, 1: second}


def test_what_begins_and_is_not_placed_keeps_its_slot_until_it_fails() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handles = submit(scheduler, "ab")
    scheduler.receive()
    assert list(scheduler.admit()) == [0]
    scheduler.fail(0, ValueError("no room"))
    with pytest.raises(EngineError, match="ValueError: no room"):
        handles["a"].result(0)
    assert admit(scheduler) == {0: "b"}


def test_receiving_waits_for_a_first_request() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    threading.Timer(0.05, scheduler.submit, [request("a")]).start()
    assert admit(scheduler) == {0: "a"}


def test_receiving_does_not_wait_while_something_runs() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    submit(scheduler, "a")
    admit(scheduler)
    scheduler.receive()  # would not return


# Cancelled and expired requests


def test_asking_whether_a_request_is_expired_does_nothing_to_it() -> None:
    handle = Handle(replace(request("a"), timeout=0.0))
    time.sleep(0.001)
    assert handle.expired and not handle.done()
    assert not Handle(replace(request("a"), timeout=60.0)).expired
    assert not Handle(request("a")).expired


@pytest.mark.parametrize("where", ["waiting", "suspects", "beginning", "running"])
def test_a_sweep_ends_cancelled_and_expired_requests_wherever_they_are(where: str) -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=3)
    handles = [scheduler.submit(replace(request(key), timeout=60.0)) for key in ("stay", "gone", "late")]
    scheduler.receive()
    tokens = 0
    if where == "beginning":
        scheduler.admit()
    if where in ("running", "suspects"):
        admit(scheduler)
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
    handles = submit(scheduler, "ab")
    admit(scheduler)
    handles["b"].cancel()
    end = time.monotonic() + 5
    while not handles["b"].done() and time.monotonic() < end:
        scheduler.receive()
    assert handles["b"].result(0).finish_reason == "cancelled"
    assert not handles["a"].done()


def test_a_request_cancelled_before_it_begins_takes_no_slot() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = submit(scheduler, "ab")
    scheduler.receive()
    handles["a"].cancel()
    assert [handle.request.id for handle in scheduler.admit().values()] == ["b"]
    assert handles["a"].result(0) == Completion("", 0, "cancelled")


def test_a_cancelled_running_request_ends_with_its_next_token() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handles = submit(scheduler, "ab")
    admit(scheduler, length=2)
    scheduler.take(0, 7)
    handles["a"].cancel()
    scheduler.take(0, 7)
    assert handles["a"].result(0) == Completion("", 2, "cancelled")
    assert admit(scheduler) == {0: "b"}


def test_a_running_request_whose_time_is_over_fails_with_its_next_token() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=1)
    handle = scheduler.submit(replace(request("a"), timeout=0.2))
    admit(scheduler)
    scheduler.take(0, 7)
    handle.submitted -= 1
    scheduler.take(0, 7)
    with pytest.raises(EngineError, match=r"not finished within its 0.2 s, after 2 tokens"):
        handle.result(0)
    assert scheduler.running == {}


def test_a_timeout_that_is_no_number_fails_its_request_alone() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    wrong = scheduler.submit(replace(request("a"), timeout="5"))  # type: ignore[arg-type]
    scheduler.submit(request("b"))
    assert list(admit(scheduler).values()) == ["b"]
    with pytest.raises(EngineError, match="not supported between"):
        wrong.result(0)


# Tokens


def test_a_token_that_cannot_be_taken_fails_its_request_alone() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = submit(scheduler, "ab")
    admit(scheduler)
    scheduler.take(0, -1)
    scheduler.take(1, 1)
    with pytest.raises(EngineError, match="ValueError: no such token"):
        handles["a"].result(0)
    assert running(scheduler) == {1: "b"}


def test_slots_are_compacted_only_when_nothing_waits_for_them() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=6, group=4)
    submit(scheduler, "abcdefghij")
    admit(scheduler, length=1)
    for slot in (0, 2, 5):
        scheduler.take(slot, 0)
    assert scheduler.compact_slots() == []  # they are given away as soon as there are four
    scheduler.take(3, 0)
    assert admit(scheduler, length=1) == {0: "g", 2: "h", 3: "i", 5: "j"}
    for slot in (0, 3, 4):
        scheduler.take(slot, 0)
    assert scheduler.compact_slots() == [(5, 0)]
    assert running(scheduler) == {0: "j", 1: "b", 2: "h"}
    assert scheduler.compact_slots() == []


def test_slots_are_not_compacted_where_a_step_would_compute_as_many() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=9, step_rows=lambda rows: 4 * -(-rows // 4))
    submit(scheduler, "abcdefghi")
    admit(scheduler, length=1)  # the ninth has steps compute twelve
    scheduler.take(8, 0)
    scheduler.take(0, 0)
    assert not scheduler.has_gaps and scheduler.compact_slots() == []
    for slot in (1, 2, 3):
        scheduler.take(slot, 0)
    assert scheduler.compact_slots() == [(4, 0), (5, 1), (6, 2), (7, 3)]
    assert running(scheduler) == {0: "e", 1: "f", 2: "g", 3: "h"}


# The end


def test_nobody_is_left_waiting_when_an_engine_ends() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    handles = submit(scheduler, "abcd")
    admit(scheduler)  # c and d wait
    scheduler.suspect(RuntimeError("a bad step"))
    admit(scheduler)  # a runs, b is a suspect
    handles |= submit(scheduler, "e")  # not received
    scheduler.abandon("the power is off")
    for key, handle in handles.items():
        with pytest.raises(EngineClosed, match="was closed" if key == "e" else "the power is off"):
            handle.result(0)
    with pytest.raises(EngineClosed, match="the engine is closed"):
        scheduler.submit(request("f"))


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
                scheduler.submit(request(str(number))).result(20)
                ends.append("answered")
            except EngineClosed:
                ends.append("closed")

    def work() -> None:
        while not scheduler.closed:
            for slot in admit(scheduler, length=1):
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
    submit(scheduler, "abc")
    admit(scheduler)
    submit(scheduler, "de")
    stats = scheduler.stats()
    assert (stats.running, stats.queued, stats.slots) == (2, 3, 2)


def test_scheduling_needs_no_torch() -> None:
    code = "import sys, sharegpt4v.engine.scheduler\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
