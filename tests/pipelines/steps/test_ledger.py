"""The ledger finds out which image kills its process, without knowing why."""

from pipelines.steps.ledger import Ledger
from sharegpt4v.engine.stats import EngineStats


def test_images_in_work_of_a_dead_worker_become_suspects() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    ledger.begin("first", ["a", "b", "c"])
    ledger.end(["a"])
    admission = ledger.begin("second", ["a", "b", "c"])
    assert admission.suspects == {"b", "c"}
    assert not admission.quarantined


def test_a_suspect_that_comes_through_alone_is_cleared() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    ledger.begin("first", ["a"])
    ledger.begin("second", ["a"])
    ledger.begin_alone("second", "a")
    ledger.end(["a"])
    assert ledger.begin("third", ["a"]).suspects == frozenset()


def test_two_lone_deaths_quarantine_and_one_does_not() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    ledger.begin("w0", ["poison", "good"])
    for worker in ("w1", "w2"):
        admission = ledger.begin(worker, ["poison", "good"])
        assert "poison" in admission.suspects
        ledger.begin_alone(worker, "poison")
    admission = ledger.begin("w3", ["poison", "good"])
    assert admission.quarantined == {"poison"}
    assert admission.suspects == {"good"}


def test_a_neighbour_of_poison_is_never_quarantined() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    for death in range(6):
        assert ledger.begin(f"w{death}", ["neighbour"]).quarantined == frozenset()


def test_the_same_worker_may_begin_an_image_again() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    ledger.begin("first", ["a"])
    assert ledger.begin("first", ["a"]).suspects == frozenset()
    assert ledger.tally().deaths == 0


def test_one_death_is_counted_once_whatever_it_had_in_work() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    ledger.begin("first", ["a", "b", "c"])
    ledger.begin("second", ["a", "b"])
    ledger.begin("third", ["c"])
    assert ledger.tally().deaths == 1


def test_the_reject_rate_is_judged_from_the_thousandth_image() -> None:
    ledger = Ledger(max_reject_rate=0.05)
    ledger.count(0, {"missing": 999})
    assert ledger.begin("w", ["a"]).stop is None
    ledger.count(0, {"missing": 1})
    stop = ledger.begin("w", ["a"]).stop
    assert stop is not None
    assert "1,000 of the first 1,000" in stop and "missing" in stop and "5.0%" in stop


def test_a_rate_at_the_limit_does_not_stop() -> None:
    ledger = Ledger(max_reject_rate=0.05)
    ledger.count(950, {"missing": 50})
    assert ledger.begin("w", ["a"]).stop is None


def test_engines_are_summed_with_the_last_report_of_each() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    assert ledger.engines() == EngineStats()
    ledger.report("first", EngineStats(requests=1, new_tokens=10, slot_steps=20, live_steps=10, slots=4))
    ledger.report("second", EngineStats(new_tokens=5, slot_steps=20, live_steps=20, slots=4))
    ledger.report("first", EngineStats(requests=3, new_tokens=30, slot_steps=40, live_steps=28, slots=4))
    ledger.report("first", EngineStats(requests=2, new_tokens=20))  # of a call that was overtaken
    together = ledger.engines()
    assert (together.new_tokens, together.slots, together.slot_use) == (35, 8, 0.8)
