"""Keys and values of finished dialogues: a next round, or the same image again, prefills only what is new."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sharegpt4v.dialogue import Image, Request
from sharegpt4v.engine.slots import SlotCache
from sharegpt4v.templates import Template

Signature = npt.NDArray[np.int64]
"""What each position of a dialogue holds: a token's id, or a number of an image's content and place."""

_LEAST_TOKENS = 16
"""Fewer are prefilled with the rest: copying them is not worth a prefill that begins behind them."""


@dataclass(slots=True, eq=False)
class _Entry:
    signature: Signature
    parts: list[Tensor]  # keys of all layers, then their values: (heads, tokens, width)


class Prefixes:
    """The most recently used dialogues, `most` of them; copies, so that slots are free for others."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: list[_Entry] = []  # the least recently used first

    def __bool__(self) -> bool:
        return self._most > 0

    def load(self, signature: Signature, cache: SlotCache, slot: int) -> int:
        """Copies the longest common beginning into a slot; returns its number of tokens, 0 for none.

        At least one token is left to prefill: the logits behind it are needed.
        """
        best, length = None, _LEAST_TOKENS - 1
        for entry in self._entries:
            common = min(_common(entry.signature, signature), len(signature) - 1)
            if common > length:
                best, length = entry, common
        if best is None:
            return 0
        self._entries.remove(best)
        self._entries.append(best)
        for stored, tensor in zip(best.parts, (*cache.keys, *cache.values), strict=True):
            tensor[slot, :, :length] = stored[:, :length]
        return length

    def store(self, signature: Signature, cache: SlotCache, slot: int) -> None:
        """Keeps what a slot holds, in place of an entry that it continues; not if an entry has it all."""
        for entry in self._entries:
            if _common(entry.signature, signature) == len(signature):
                return
        self._entries = [e for e in self._entries if _common(e.signature, signature) < len(e.signature)]
        parts = [tensor[slot, :, : len(signature)].clone() for tensor in (*cache.keys, *cache.values)]
        self._entries.append(_Entry(signature, parts))
        del self._entries[: max(0, len(self._entries) - self._most)]

    def clear(self) -> None:
        self._entries.clear()


def signature_of(template: Template, request: Request, generated: Sequence[int]) -> Signature:
    """Returns what each position holds of a prompt and the tokens generated behind it."""
    parts: list[Signature] = []
    images = iter(request.images)
    for number, segment in enumerate(template.segments(request.turns)):
        if number:
            first = _number_of(next(images))
            parts.append(np.arange(first, first + template.image_tokens, dtype=np.int64))
        parts.append(np.array(segment, dtype=np.int64))
    return np.concatenate([*parts, np.array(generated, dtype=np.int64)])


def _number_of(image: Image) -> int:
    """Returns a negative number by an image's content, which no token has, with room for its positions."""
    content = image.data if image.flags.c_contiguous else image.tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return -(int.from_bytes(digest, "big") >> 2) - 2**40


def _common(one: Signature, other: Signature) -> int:
    """Returns the number of equal values at the beginning."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
