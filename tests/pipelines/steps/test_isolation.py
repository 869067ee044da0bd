"""Suspects are tried with nothing else in their process."""

import threading
import time

import pytest

from pipelines.steps.isolation import Isolation, RunStopped
from pipelines.steps.ledger import Ledger


def test_all_positions_are_worked_on_once_when_nobody_died() -> None:
    calls: list[list[int]] = []
    assert Isolation(Ledger(1.0), "caption").run(["a", "b", "c"], calls.append) == []
    assert calls == [[0, 1, 2]]


def test_suspects_come_one_by_one_after_the_others() -> None:
    ledger = Ledger(1.0)
    ledger.begin("dead", ["caption:b", "caption:c"])
    calls: list[list[int]] = []
    Isolation(ledger, "caption").run(["a", "b", "c", "d"], calls.append)
    assert calls == [[0, 3], [1], [2]]


def test_a_quarantined_image_is_returned_and_never_worked_on() -> None:
    ledger = Ledger(1.0)
    for worker in ("w0", "w1", "w2"):
        ledger.begin(worker, ["caption:a"])
        ledger.begin_alone(worker, "caption:a")
    calls: list[list[int]] = []
    assert Isolation(ledger, "caption").run(["a", "b"], calls.append) == [0]
    assert calls == [[1]]


def test_stages_hold_nothing_against_each_other() -> None:
    ledger = Ledger(1.0)
    ledger.begin("dead", ["decode:a"])
    calls: list[list[int]] = []
    Isolation(ledger, "caption").run(["a"], calls.append)
    assert calls == [[0]]
    assert ledger.tally().deaths == 0


def test_a_stopped_run_raises_with_the_reason() -> None:
    ledger = Ledger(0.0)
    ledger.count("1", 0, {"missing": 1_000})
    with pytest.raises(RunStopped, match="missing"):
        Isolation(ledger, "caption").run(["a"], lambda rows: None)


def test_a_suspect_is_alone_in_its_process() -> None:
    """Four threads work in one process; whenever the suspect is in work nobody else is."""
    ledger = Ledger(1.0)
    ledger.begin("dead", ["caption:suspect"])
    isolation = Isolation(ledger, "caption")
    inside: set[int] = set()
    overlaps: list[set[int]] = []
    lock = threading.Lock()

    def work(name: int, is_suspect: bool) -> None:
        with lock:
            inside.add(name)
        for _ in range(10):
            time.sleep(0.002)
            with lock:
                if is_suspect and len(inside) > 1:
                    overlaps.append(set(inside))
        with lock:
            inside.remove(name)

    def call(name: int) -> None:
        for round_ in range(5):
            isolation.run([f"{name}-{round_}"], lambda rows: work(name, False))

    threads = [threading.Thread(target=call, args=(name,)) for name in range(3)]
    threads.append(threading.Thread(target=isolation.run, args=(["suspect"], lambda rows: work(9, True))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
