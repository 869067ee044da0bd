"""All captions of a finished run read once: figures over all of them, and the rows that its report shows."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.captions import parts
from sharegpt4v.captions.near_duplicates import NearDuplicates, Repeats
from sharegpt4v.captions.sample import CaptionSample, RejectSample, Row
from sharegpt4v.captions.words import WordCounts, tokenise

WORDS = 40
"""Frequent words listed."""

GROUPS = 8
"""Groups of near duplicates shown."""

_BATCH_ROWS = 4_096
"""Smaller than other readers': what is computed of a caption takes several times its own bytes."""


@dataclass(frozen=True)
class Overview:
    """lengths: captions by characters. retried, cut: captions on the second attempt, and at the length limit.

    words: each with the captions that have it. repeats: which captions repeat each other; repeated: rows of
    these by position. captions, rejects: the sampled rows.
    """

    lengths: Counter[int]
    retried: int
    cut: int
    words: list[tuple[str, int]]
    repeats: Repeats
    repeated: dict[int, Row]
    captions: list[Row]
    rejects: list[Row]


def count_lengths(captions: pa.RecordBatch) -> dict[int, int]:
    """Returns the number of captions of each length in characters."""
    counts = pc.value_counts(pc.utf8_length(captions["caption"]))
    return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}


def read_overview(run: Path, sample: int, seed: int) -> Overview:
    """Reads captions/ and rejects/ in batches.

    Words and near duplicates are those of the first near_duplicates.MAX_CAPTIONS captions: these take about
    three seconds, all others a few microseconds each.
    sample: captions drawn evenly; `seed` chooses which.
    """
    lengths: Counter[int] = Counter()
    retried = cut = 0
    captions, rejects = CaptionSample(sample, seed), RejectSample(seed)
    words, duplicates = WordCounts(), NearDuplicates()
    for batch in parts.batches(run, "captions", rows=_BATCH_ROWS):
        lengths.update(count_lengths(batch))
        retried += pc.sum(pc.greater(batch["attempt"], 0)).as_py() or 0
        cut += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py() or 0
        captions.add(batch)
        if not duplicates.full:
            tokens = tokenise(batch["caption"])
            words.add(tokens)
            duplicates.add(tokens)
    for batch in parts.batches(run, "rejects"):
        rejects.add(batch)
    repeats = duplicates.groups(GROUPS)
    shown = [position for group in repeats.largest for position in group.members]
    return Overview(
        lengths=lengths,
        retried=retried,
        cut=cut,
        words=words.most_common(WORDS),
        repeats=repeats,
        repeated={
            position: row | {"characters": len(row["caption"]), "chosen": []}
            for position, row in parts.rows_at(run, "captions", shown).items()
        },
        captions=captions.rows(),
        rejects=rejects.rows(),
    )
