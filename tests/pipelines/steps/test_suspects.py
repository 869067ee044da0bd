"""Which image kills its process is found out, without knowing why."""

from pipelines.steps.suspects import Suspects


def test_images_in_work_of_a_dead_worker_become_suspects() -> None:
    suspects = Suspects()
    suspects.begin("first", ["a", "b", "c"])
    suspects.end(["a"])
    admission = suspects.begin("second", ["a", "b", "c"])
    assert admission.suspects == {"b", "c"}
    assert not admission.quarantined


def test_a_suspect_that_comes_through_alone_is_cleared() -> None:
    suspects = Suspects()
    suspects.begin("first", ["a"])
    suspects.begin("second", ["a"])
    suspects.begin_alone("second", "a")
    suspects.end(["a"])
    assert suspects.begin("third", ["a"]).suspects == frozenset()


def test_two_lone_deaths_quarantine_and_one_does_not() -> None:
    suspects = Suspects()
    suspects.begin("w0", ["poison", "good"])
    for worker in ("w1", "w2"):
        admission = suspects.begin(worker, ["poison", "good"])
        assert "poison" in admission.suspects
        suspects.begin_alone(worker, "poison")
    admission = suspects.begin("w3", ["poison", "good"])
    assert admission.quarantined == {"poison"}
    assert admission.suspects == {"good"}


def test_a_neighbour_of_poison_is_never_quarantined() -> None:
    suspects = Suspects()
    for death in range(6):
        assert suspects.begin(f"w{death}", ["neighbour"]).quarantined == frozenset()


def test_the_same_worker_may_begin_an_image_again() -> None:
    suspects = Suspects()
    suspects.begin("first", ["a"])
    assert suspects.begin("first", ["a"]).suspects == frozenset()
    assert suspects.deaths == 0


def test_one_death_is_counted_once_whatever_it_had_in_work() -> None:
    suspects = Suspects()
    suspects.begin("first", ["a", "b", "c"])
    suspects.begin("second", ["a", "b"])
    suspects.begin("third", ["c"])
    assert suspects.deaths == 1
