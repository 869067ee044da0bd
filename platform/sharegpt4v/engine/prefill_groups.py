"""Groups requests that begin together into passes of the vision tower and into prefills."""

from collections.abc import Iterator, Mapping

PREFILL_TOKENS = 8_192
"""Most prompt tokens, padding included, of one prefill: bounds its memory and how long decoding waits."""

_PADDING = 1.25
"""Prompts are prefilled together while the longest is at most this many times the shortest."""

_EMBED_AT_ONCE = 32
"""Images that go through the vision tower together, unless one request has more."""


def embed_groups(images: Mapping[int, int]) -> Iterator[list[int]]:
    """Yields slots in order, as many as one pass of the vision tower takes. images: their number by slot."""
    group: list[int] = []
    held = 0
    for slot, count in images.items():
        held += count
        if group and held > _EMBED_AT_ONCE:
            yield group
            group, held = [], count
        group.append(slot)
    if group:
        yield group


def prefill_groups(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Yields slots by ascending prompt length, in groups that need little padding."""
    group: list[int] = []
    for slot in sorted(lengths, key=lengths.__getitem__):
        longest = lengths[slot]
        shortest = lengths[group[0]] if group else longest
        if group and (longest > _PADDING * shortest or (len(group) + 1) * longest > PREFILL_TOKENS):
            yield group
            group = []
        group.append(slot)
    if group:
        yield group
