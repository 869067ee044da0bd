"""Captions that repeat each other, word for word or nearly: a sign of a captioner without sight.

Each caption leaves 72 bytes: a digest of its words, and a MinHash signature of its five-word sequences. Two
signatures agree in about the share of sequences that their captions have in common, out of all that either
has (Broder 1997). Neighbours in several sorted orders of the signatures are compared, so that the time
grows with the captions and not with their pairs.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from sharegpt4v.captions.words import Tokens

SEQUENCE = 5
"""Words of a sequence that is compared."""

HASHES = 16
"""Values of a signature."""

AGREEING = 12
"""Values in which two signatures must agree for their captions to count as near duplicates."""

MAX_CAPTIONS = 50_000
"""Captions compared, the first of a run: about three seconds, which a million would make a minute."""

SHOWN = 4
"""Captions named of a group."""

_RANDOM = np.random.default_rng(2311_12793)
_FACTORS = _RANDOM.integers(0, 2**32, HASHES, np.uint32) | np.uint32(1)
_OFFSETS = _RANDOM.integers(0, 2**32, HASHES, np.uint32)
_PLACES = _RANDOM.integers(0, 2**63, SEQUENCE, np.uint64) * np.uint64(2) + np.uint64(1)

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Captions that repeat each other, directly or through others.

    members: positions in reading order of the first SHOWN, with different wording first. same: all have
    the same words.
    """

    size: int
    members: list[int]
    same: bool


@dataclass(frozen=True)
class Repeats:
    """compared: captions looked at. repeated: those in any group. groups: all; largest: the first of them."""

    compared: int
    repeated: int
    groups: int
    largest: list[Group]


class NearDuplicates:
    """Takes captions in reading order and groups at the end those that repeat each other."""

    def __init__(self) -> None:
        self._digests: list[Hashes] = []
        self._signatures: list[npt.NDArray[np.uint32]] = []
        self._compared = 0

    @property
    def full(self) -> bool:
        """Whether as many captions were taken as are compared."""
        return self._compared >= MAX_CAPTIONS

    def add(self, tokens: Tokens) -> None:
        """Takes the captions after those of the last call; those beyond MAX_CAPTIONS are left out."""
        if self.full:
            return
        texts = [blake2b(text.encode(), digest_size=8).digest() for text in tokens.texts.to_pylist()]
        self._digests.append(np.frombuffer(b"".join(texts), np.uint64))
        self._signatures.append(signatures(tokens))
        self._compared += len(texts)

    def groups(self, count: int) -> Repeats:
        """Returns the `count` largest groups, of equal ones the first. To be called once, at the end."""
        digests = np.concatenate([np.zeros(0, np.uint64), *self._digests])
        order = np.argsort(digests, kind="stable")  # equal texts side by side, each in reading order
        first = np.ones(len(order), np.bool_)
        first[1:] = digests[order][1:] != digests[order][:-1]
        starts = np.flatnonzero(first)
        sizes = np.diff(starts, append=len(order))
        signature = np.concatenate([np.zeros((0, HASHES), np.uint32), *self._signatures])[order[starts]]
        self._signatures.clear()
        roots = _components(len(starts), *_near(signature))
        by_root = np.argsort(roots, kind="stable")
        edges = np.flatnonzero(np.diff(roots[by_root], prepend=-1))
        texts, captions = np.diff(edges, append=len(by_root)), np.zeros(0, np.int64)
        if len(edges):
            captions = np.add.reduceat(sizes[by_root], edges)
        repeated = captions > 1
        ranked = sorted(
            (-int(captions[i]), int(order[starts[by_root[edges[i]]]]), int(i))
            for i in np.flatnonzero(repeated)
        )
        return Repeats(
            compared=self._compared,
            repeated=int(captions[repeated].sum()),
            groups=len(ranked),
            largest=[
                Group(-size, _shown(order, starts[group], sizes[group]), len(group) == 1)
                for size, _, i in ranked[:count]
                for group in [by_root[edges[i] : edges[i] + texts[i]]]
            ],
        )


def signatures(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Returns (captions, HASHES) uint32, all zeros where a caption has fewer than SEQUENCE words."""
    words = [blake2b(word.encode(), digest_size=8).digest() for word in tokens.vocabulary]
    hashes = np.frombuffer(b"".join(words), np.uint64)[tokens.codes]
    found = np.zeros((len(tokens.lengths), HASHES), np.uint32)
    windows = len(hashes) - SEQUENCE + 1
    long = np.flatnonzero(tokens.lengths >= SEQUENCE)
    if not len(long):
        return found
    mixed = np.zeros(windows, np.uint64)
    for place in range(SEQUENCE):
        mixed += hashes[place : place + windows] * _PLACES[place]
    short = (mixed >> np.uint64(32)).astype(np.uint32)
    # Windows that reach into the next caption: the last four of each, and all of a shorter one.
    ends = np.cumsum(tokens.lengths)
    inside = np.ones(len(hashes), np.bool_)
    for place in range(1, SEQUENCE):
        inside[(ends - place)[tokens.lengths >= place]] = False
    short = short[inside[:windows]]
    firsts = np.cumsum(tokens.lengths[long] - SEQUENCE + 1)
    firsts = np.concatenate([[0], firsts[:-1]])
    for number in range(HASHES):
        found[long, number] = np.minimum.reduceat(short * _FACTORS[number] + _OFFSETS[number], firsts)
    return found


def _near(signature: npt.NDArray[np.uint32]) -> tuple[Positions, Positions]:
    """Returns pairs of rows that agree in AGREEING values and are neighbours in one of four orders."""
    pairs = np.ascontiguousarray(signature).view(np.uint64)  # two values each
    rows = np.flatnonzero(signature.any(axis=1))
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, pairs.shape[1], 2):
        keys = [pairs[rows, (start + i) % pairs.shape[1]] for i in (3, 2, 1, 0)]
        order = rows[np.lexsort(keys)]
        agree = (signature[order[1:]] == signature[order[:-1]]).sum(axis=1) >= AGREEING
        left.append(order[:-1][agree])
        right.append(order[1:][agree])
    return np.concatenate(left), np.concatenate(right)


def _components(count: int, left: Positions, right: Positions) -> Positions:
    """Returns for each of `count` items the smallest one it is joined to, directly or through others."""
    root: dict[int, int] = {}  # of those only that are joined to a smaller one

    def find(node: int) -> int:
        while node in root:
            above = root[node]
            root[node] = node = root.get(above, above)
        return node

    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        a, b = find(a), find(b)
        if a != b:
            root[max(a, b)] = min(a, b)
    roots = np.arange(count)
    for node in list(root):
        roots[node] = find(node)
    return roots


def _shown(order: Positions, starts: Positions, sizes: Positions) -> list[int]:
    """Returns the first caption of each wording, then further ones of the same wordings, SHOWN at most."""
    several = [order[start : start + min(size, SHOWN)] for start, size in zip(starts, sizes, strict=True)]
    firsts = sorted(int(bearers[0]) for bearers in several)
    others = sorted(int(position) for bearers in several for position in bearers[1:])
    return [*firsts, *others][:SHOWN]
