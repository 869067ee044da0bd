"""The scheduler after a step that failed: who is tried again, with whom, and who goes on meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest

from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.scheduler import Scheduler
from tests.engine.spelling import Spelling, admit, running, submit


@pytest.mark.parametrize(
    ("fault", "expected"), [("c", ["abcd", "ab", "cd", "c", "d"]), ("a", ["abcd", "ab", "a", "b", "cd"])]
)
def test_suspects_are_tried_by_halves_until_the_one_at_fault_is_alone(
    fault: str, expected: list[str]
) -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=4)
    handles = submit(scheduler, "abcd")
    groups = []
    while not all(handle.done() for handle in handles.values()):
        group = admit(scheduler, length=1)
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
    submit(scheduler, "abcd")
    admit(scheduler, length=1)
    scheduler.suspect(RuntimeError("a bad step"))
    submit(scheduler, "ef")
    assert admit(scheduler, length=1) == {0: "a", 1: "b"}
    scheduler.take(0, 1)
    assert admit(scheduler) == {}
    scheduler.take(1, 1)
    assert admit(scheduler, length=1) == {0: "c", 1: "d"}


def test_requests_that_begin_are_suspects_too() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2)
    submit(scheduler, "ab")
    admit(scheduler, length=1)
    scheduler.take(0, 1)
    submit(scheduler, "c")
    scheduler.receive()
    assert list(scheduler.admit()) == [0]
    scheduler.suspect(RuntimeError("a bad prefill"))
    assert admit(scheduler, length=1) == {0: "b"}
    scheduler.take(0, 1)
    assert admit(scheduler) == {0: "c"}


@pytest.mark.parametrize("how", ["suspect", "fail", "take"])
def test_an_error_that_concerns_all_is_raised_and_blames_nobody(how: str) -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2, concerns_all=lambda error: isinstance(error, ValueError))
    handles = submit(scheduler, "ab")
    admit(scheduler)
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
    submit(scheduler, "abcd")
    admit(scheduler)
    scheduler.suspect(RuntimeError("a bad step"))
    submit(scheduler, "ef")
    assert admit(scheduler) == {0: "a", 1: "b"}
    scheduler.restart(slots=3, group=1)
    assert scheduler.stats().slots == 3 and scheduler.stats().queued == 6
    assert admit(scheduler, length=1) == {0: "a", 1: "b", 2: "c"}
    for slot in (0, 1, 2):
        scheduler.take(slot, 1)
    assert admit(scheduler) == {0: "d", 1: "e", 2: "f"}


# Engines whose steps leave out who is not on trial


def _begin(scheduler: Scheduler[Any]) -> dict[int, str]:
    """Places all that is admitted; who was interrupted goes on with its tokens."""
    scheduler.receive()
    for slot, handle in scheduler.admit().items():
        scheduler.place(slot, scheduler.interrupted(handle) or Spelling(handle))
    return running(scheduler)


def _live(scheduler: Scheduler[Any]) -> str:
    return "".join(sorted(run.handle.request.id for run in scheduler.live.values()))


def _slot(scheduler: Scheduler[Any], key: str) -> int:
    return next(slot for slot, name in running(scheduler).items() if name == key)


def test_others_keep_their_slots_while_suspects_are_tried() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=6, pauses=True)
    submit(scheduler, "abcdef")
    _begin(scheduler)
    scheduler.suspect(RuntimeError("a bad step"), [0, 1, 2, 3])
    assert set(running(scheduler).values()) == set("ef")
    assert _live(scheduler) == "ef"  # until the first half is prefilled
    _begin(scheduler)
    assert _live(scheduler) == "ab"
    assert _begin(scheduler).keys() == {0, 1, 4, 5}  # one group at a time
    for key in "ab":
        scheduler.take(_slot(scheduler, key), 1)
    assert _live(scheduler) == "abef"
    _begin(scheduler)
    assert _live(scheduler) == "cd"
    scheduler.take(_slot(scheduler, "c"), 1)
    assert _live(scheduler) == "d"
    scheduler.take(_slot(scheduler, "d"), 1)
    assert _live(scheduler) == "abcdef"


def test_who_was_interrupted_goes_on_with_its_tokens() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2, pauses=True)
    handles = submit(scheduler, "ab")
    _begin(scheduler)
    before = dict(scheduler.running)
    for token in (5, 6):
        for slot in (0, 1):
            scheduler.take(slot, token)
    scheduler.suspect(RuntimeError("a bad step"))
    assert scheduler.interrupted(handles["a"]) is before[0]
    _begin(scheduler)
    assert scheduler.running == {0: before[0]}
    assert scheduler.interrupted(handles["a"]) is None
    scheduler.restart(slots=1, group=1)
    assert scheduler.interrupted(handles["a"]) is before[0]
    handles["a"].cancel()
    scheduler.sweep()
    assert handles["a"].result(0).tokens == 2
    assert scheduler.interrupted(handles["a"]) is None
    assert _begin(scheduler) == {0: "b"}
    assert scheduler.running[0].tokens == [5, 6]


def test_who_fails_only_together_is_separated_in_the_end() -> None:
    """A step fails whenever `a` and `b` are both in it."""
    scheduler: Scheduler[Any] = Scheduler(slots=4, pauses=True)
    handles = submit(scheduler, "abcd")
    steps = 0
    while not all(handle.done() for handle in handles.values()):
        _begin(scheduler)
        steps += 1
        live = dict(scheduler.live)
        if {"a", "b"} <= {run.handle.request.id for run in live.values()}:
            scheduler.suspect(RuntimeError("too much at once"), list(live))
            continue
        for slot, run in live.items():
            run.length = 40
            scheduler.take(slot, 1)
        assert steps < 400
    assert {handle.result(0).tokens for handle in handles.values()} == {40}


def test_a_cancelled_suspect_ends_its_trial() -> None:
    scheduler: Scheduler[Any] = Scheduler(slots=2, pauses=True)
    handles = submit(scheduler, "ab")
    _begin(scheduler)
    scheduler.suspect(RuntimeError("a bad step"))
    _begin(scheduler)
    assert _live(scheduler) == "a"
    handles["a"].cancel()
    scheduler.sweep()
    assert _begin(scheduler) == {0: "b"}
