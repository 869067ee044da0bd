import numpy as np

from serve.affinity import MOST_DIALOGUES, Dialogues, News, Place, Places, dialogue_hash
from sharegpt4v.dialogue import Request, Turn

IMAGE = np.zeros((4, 4, 3), np.uint8)


def _request(text: str = "What?", rounds: int = 1, image: int = 0, system: str = "") -> Request:
    first = [Turn("system", system)] if system else []
    later = [Turn("assistant", "A boat."), Turn("user", f"And {rounds}?")] * (rounds - 1)
    return Request(str(rounds), (*first, Turn("user", text, (IMAGE + image,)), *later))


def test_the_hash_is_of_the_first_question_its_images_and_the_instructions() -> None:
    assert dialogue_hash(_request()) == dialogue_hash(_request(rounds=3))
    others = [_request("Who?"), _request(image=1), _request(system="Be brief.")]
    assert len({dialogue_hash(request) for request in [_request(), *others]}) == 4


def test_a_later_round_goes_to_the_replica_of_the_earlier_ones() -> None:
    places, first, second = Places(), Dialogues("first"), Dialogues("second")
    first.note(_request())
    assert places.exchange("first", first.take_fresh()) == () == first.take_fresh()
    second.hear(News(places=places.exchange("second", ())))
    assert second.better_replica(_request(rounds=2)) == "first"
    assert second.better_replica(_request(rounds=1)) is None, "a first round has nothing there"
    assert second.better_replica(_request("Who?", rounds=2)) is None
    assert first.better_replica(_request(rounds=2)) is None, "it is here"
    assert places.exchange("second", ()) == (), "each place is passed on once"


def test_a_replica_with_waiting_requests_is_passed_over() -> None:
    second = Dialogues("second")
    place = (Place(dialogue_hash(_request()), "first"),)
    second.hear(News(places=place, queued={"first": 2}))
    assert second.better_replica(_request(rounds=2)) is None
    second.hear(News(queued={"first": 0}))
    assert second.better_replica(_request(rounds=2)) == "first"


def test_the_last_replica_counts_and_one_that_has_ended_is_forgotten() -> None:
    places, third = Places(), Dialogues("third")
    places.exchange("first", ["a", "b"])
    places.exchange("second", ["a"])
    third.hear(News(places=places.exchange("third", ())))
    assert [third._places[name] for name in "ab"] == ["second", "first"]
    places.forget("second")
    assert places.exchange("fourth", ()) == (Place("a", "first"), Place("b", "first"))


def test_no_more_dialogues_are_kept_than_may_be() -> None:
    places, known = Places(), Dialogues("first")
    for start in range(0, 3 * MOST_DIALOGUES, 1024):
        places.exchange("other", [str(number) for number in range(start, start + 1024)])
    known.hear(News(places=places.exchange("first", ())))
    assert len(known._places) == MOST_DIALOGUES and "0" not in known._places
