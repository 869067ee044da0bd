"""What workers report and what they are answered."""

import pickle

from pipelines.steps.ledger import Ledger, Tally
from sharegpt4v.engine.stats import EngineStats


def test_engines_are_summed_with_the_last_report_of_each() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    assert ledger.engines() == EngineStats()
    ledger.report("first", EngineStats(requests=1, new_tokens=10, slot_steps=20, live_steps=10, slots=4))
    ledger.report("second", EngineStats(new_tokens=5, slot_steps=20, live_steps=20, slots=4))
    ledger.report("first", EngineStats(requests=3, new_tokens=30, slot_steps=40, live_steps=28, slots=4))
    ledger.report("first", EngineStats(requests=2, new_tokens=20))  # of a call that was overtaken
    together = ledger.engines()
    assert (together.new_tokens, together.slots, together.slot_use) == (35, 8, 0.8)


def test_the_tally_counts_images_by_outcome_and_deaths() -> None:
    ledger = Ledger(max_reject_rate=1.0)
    ledger.begin("dead", ["a"])
    ledger.begin("next", ["a"])
    ledger.count("1", 3, {"missing": 1})
    ledger.count("2", 2, {"missing": 1, "empty": 1})
    tally = ledger.tally()
    assert tally == Tally(5, {"missing": 2, "empty": 1}, deaths=1)
    assert (tally.rejects, tally.done) == (3, 8)
    assert pickle.loads(pickle.dumps(tally)) == tally  # it crosses to the driver


def test_a_run_that_is_stopped_admits_no_image() -> None:
    ledger = Ledger(max_reject_rate=0.0)
    assert ledger.begin("w", ["a"]).stop is None
    stop = ledger.count("3", 0, {"missing": 1_000})
    assert stop is not None and ledger.begin("w", ["b"]).stop == stop
