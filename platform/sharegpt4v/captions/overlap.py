"""Two finished runs joined by the ids of their images: what became of each image in both.

Memory holds 24 bytes for each image of a run.
"""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.captions import parts
from sharegpt4v.captions.notes import read_summary
from sharegpt4v.captions.overview import count_lengths
from sharegpt4v.captions.page import printable
from sharegpt4v.captions.sample import sampling_keys
from sharegpt4v.errors import UserError
from sharegpt4v.run.settings import read_settings

Keys = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    captions, rejects: a key of each id. texts, images: a digest of each caption's text and of its image's
    bytes, in the order of `captions`. lengths: captions by characters.
    """

    run: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    lengths: Counter[int]
    captions: Keys
    texts: Keys
    images: Keys
    rejects: Keys

    @property
    def name(self) -> str:
        return printable(self.run.resolve().name)


@dataclass(frozen=True)
class Overlap:
    """Images by what became of them in the two runs.

    both: captioned in both; same_text of these have equal captions, other_image different bytes. only_a,
    only_b: captioned there and rejected in the other. neither: rejected in both. a_alone, b_alone: in the
    manifest of one run.
    """

    both: int
    same_text: int
    other_image: int
    only_a: int
    only_b: int
    neither: int
    a_alone: int
    b_alone: int


def read_side(run: Path) -> Side:
    """Reads a run, its captions in batches. Raises UserError for one that is not finished."""
    settings = read_settings(run)
    if not (run / "_SUCCESS").exists():
        raise UserError(f"{run} is not finished (it has no _SUCCESS): run its `sharegpt4v caption` again")
    lengths: Counter[int] = Counter()
    captions, texts, images = [], [], []
    for batch in parts.batches(run, "captions", ["id", "caption", "image_sha256"]):
        lengths.update(count_lengths(batch))
        captions.append(sampling_keys(batch["id"], 0))
        texts.append(_digests(batch["caption"]))
        images.append(_digests(batch["image_sha256"]))
    rejects = [sampling_keys(batch["id"], 0) for batch in parts.batches(run, "rejects", ["id"])]
    return Side(
        run=run,
        settings=settings,
        summary=read_summary(run),
        lengths=lengths,
        captions=_joined(captions),
        texts=_joined(texts),
        images=_joined(images),
        rejects=_joined(rejects),
    )


def captioned_by_both(left: Side, right: Side) -> tuple[Positions, Positions]:
    """Returns positions of the same images among the captions of each side, in a random but fixed order."""
    _, at_left, at_right = np.intersect1d(
        left.captions, right.captions, assume_unique=True, return_indices=True
    )
    return at_left, at_right


def count_overlap(left: Side, right: Side) -> Overlap:
    """Returns the numbers of images of two runs by their outcomes."""
    at_left, at_right = captioned_by_both(left, right)
    neither = _common(left.rejects, right.rejects)
    only_a, only_b = _common(left.captions, right.rejects), _common(left.rejects, right.captions)
    shared = len(at_left) + neither + only_a + only_b
    return Overlap(
        both=len(at_left),
        same_text=int((left.texts[at_left] == right.texts[at_right]).sum()),
        other_image=int((left.images[at_left] != right.images[at_right]).sum()),
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        a_alone=len(left.captions) + len(left.rejects) - shared,
        b_alone=len(right.captions) + len(right.rejects) - shared,
    )


def _common(one: Keys, other: Keys) -> int:
    return len(np.intersect1d(one, other, assume_unique=True))


def _digests(texts: pa.Array) -> Keys:
    digests = (blake2b(text.encode(), digest_size=8).digest() for text in pc.fill_null(texts, "").to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


def _joined(batches: list[Keys]) -> Keys:
    return np.concatenate([np.zeros(0, np.uint64), *batches])
