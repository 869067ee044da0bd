"""Sends the next round of a dialogue to the replica that has the keys and values of those before.

Serve cannot tell: its routers see a header or an id, and clients send neither. So each replica of the chat
model remembers the dialogues it has answered, by a hash of their first turns; the board passes the hashes on
to the others within two seconds, and a later round that reaches one of these is forwarded.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sharegpt4v.dialogue import Request

MOST_DIALOGUES = 4_096
"""Dialogues that are remembered, the last ones; engines keep the keys and values of far fewer."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a dialogue was answered last: the hash of its first turns, and the replica's name."""

    dialogue: str
    replica: str


@dataclass(frozen=True, slots=True)
class News:
    """What the board answers to a report. places: new ones of other replicas, the latest last.

    queued: requests that wait at each replica. draining: whether requests are to be refused from now on.
    """

    draining: bool = False
    places: tuple[Place, ...] = ()
    queued: Mapping[str, int] = field(default_factory=dict)


class Dialogues:
    """The dialogues that replicas have answered, as one replica knows it."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._places: OrderedDict[str, str] = OrderedDict()
        self._fresh: list[str] = []
        self._queued: Mapping[str, int] = {}

    def better_replica(self, request: Request) -> str | None:
        """Returns the other replica that answered the rounds before; None for a first round.

        None, too, for one where requests wait: a whole prefill here ends sooner.
        """
        if not any(turn.role == "assistant" for turn in request.turns):
            return None
        found = self._places.get(dialogue_hash(request))
        return None if found in (None, self._replica) or self._queued.get(found or "", 0) else found

    def note(self, request: Request) -> None:
        """Remembers that this replica answers the dialogue."""
        dialogue = dialogue_hash(request)
        self._remember(dialogue, self._replica)
        self._fresh = [*self._fresh, dialogue][-MOST_DIALOGUES:]

    def take_fresh(self) -> tuple[str, ...]:
        """Returns the dialogues that were answered since the last call."""
        fresh, self._fresh = tuple(self._fresh), []
        return fresh

    def hear(self, news: News) -> None:
        """Takes what other replicas have answered."""
        for place in news.places:
            self._remember(place.dialogue, place.replica)
        self._queued = news.queued

    def _remember(self, dialogue: str, replica: str) -> None:
        self._places[dialogue] = replica
        self._places.move_to_end(dialogue)
        while len(self._places) > MOST_DIALOGUES:
            self._places.popitem(last=False)


class Places:
    """The dialogues of all replicas, as the board keeps them."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._number = 0  # of all that ever were
        self._heard: dict[str, int] = {}  # the number up to which each replica has them

    def exchange(self, replica: str, fresh: Sequence[str]) -> tuple[Place, ...]:
        """Takes a replica's new dialogues and returns those of others since it last asked."""
        missing = self._number - self._heard.get(replica, 0)
        news = self._places[-missing:] if missing else []
        self._places = [*self._places, *(Place(dialogue, replica) for dialogue in fresh)][-MOST_DIALOGUES:]
        self._number += len(fresh)
        self._heard[replica] = self._number
        return tuple(place for place in news if place.replica != replica)

    def forget(self, replica: str) -> None:
        """Forgets a replica that has ended, and its dialogues."""
        self._heard.pop(replica, None)
        self._places = [place for place in self._places if place.replica != replica]


def dialogue_hash(request: Request) -> str:
    """Returns a hash of the first turns, up to the first question with its images."""
    found = hashlib.blake2b(digest_size=12)
    for turn in request.turns:
        found.update(f"{turn.role}\0{len(turn.text)}\0{turn.text}".encode("utf-8", "surrogatepass"))
        for image in turn.images:
            found.update(f"{image.shape}".encode())
            found.update(image.tobytes())
        if turn.role == "user":
            break
    return found.hexdigest()
