"""What `data` names: caption runs and conversation files, each with a weight, as one kind of raw record."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharegpt4v.captions import parts
from sharegpt4v.errors import UserError
from sharegpt4v.manifest.locate import locate
from sharegpt4v.manifest.read import read_batches
from sharegpt4v.run.settings import read_settings

_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """weight: share of the records that an epoch takes; 2 takes each twice."""

    path: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "TrainingSet":
        """Reads PATH or PATH:WEIGHT. Raises UserError for a weight of zero and for what does not exist."""
        found = _WEIGHT.fullmatch(text)
        if found is None or Path(text).exists():
            each = cls(text)
        else:
            each = cls(found["path"], float(found["weight"]))
        if not each.weight:
            raise UserError(f"{text}: a weight of 0 takes nothing; leave it out", field="data")
        if "://" not in each.path and not Path(each.path).exists():
            raise UserError(
                f"{each.path} does not exist: give a caption run or a conversation file", field="data"
            )
        return each

    @property
    def is_run(self) -> bool:
        return (Path(self.path) / "run.yaml").exists()

    def stamp(self) -> list[Any]:
        """Returns what shows that the same data are there: paths, sizes and times of files."""
        folder = Path(self.path)
        files = sorted(folder.glob("captions/part-*.parquet")) if self.is_run else [folder]
        stats = [(str(file.absolute()), file.stat()) for file in files if file.exists()]
        return [self.path, self.weight, *[[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as its file has it; turns as in records.TURN. image: None for text alone."""

    id: str
    image: str | None
    container: str
    offset: int
    size: int
    turns: Sequence[Mapping[str, str | None]] | None


def iter_set(each: TrainingSet, root: str | None) -> tuple[str | None, Iterator[RawRecord]]:
    """Returns where image paths start and the records of a set, which are read as they are asked for.

    Raises UserError, then or later, for an unfinished caption run and for what cannot be read.
    """
    if each.is_run:
        return _caption_run(Path(each.path), root)
    located = locate(each.path, root)
    return located.root, _conversations(read_batches(located, text_alone=True))


def _conversations(batches: Iterator[Any]) -> Iterator[RawRecord]:
    for batch in batches:
        for row in batch.to_pylist():
            where = (row["image"], row["container"], row["offset"], row["size"])
            yield RawRecord(row["id"], *where, turns=row["conversations"])


def _caption_run(run: Path, root: str | None) -> tuple[str | None, Iterator[RawRecord]]:
    if not (run / "_SUCCESS").exists():
        raise UserError(
            f"{run} is not finished (it has no _SUCCESS): run its `sharegpt4v caption` again", field="data"
        )
    settings = read_settings(run)
    return root or settings["root"], _captions(run, settings["prompt_text"])


def _captions(run: Path, prompt: str) -> Iterator[RawRecord]:
    """Joins captions with the places of their images: both are in manifest order, so memory stays flat."""
    columns = ["id", "image", "container", "offset", "size"]
    places = (row for batch in parts.batches(run, "manifest", columns) for row in batch.to_pylist())
    for batch in parts.batches(run, "captions", ["id", "caption"]):
        for caption in batch.to_pylist():
            place = next((row for row in places if row["id"] == caption["id"]), None)
            if place is None:
                raise UserError(
                    f"{run}: the caption of {caption['id']} is not in the order of the manifest; finish the "
                    "run again",
                    field="data",
                )
            turns = [
                {"from": "human", "value": f"<image>\n{prompt}"},
                {"from": "gpt", "value": caption["caption"]},
            ]
            where = (place["image"], place["container"], place["offset"], place["size"])
            yield RawRecord(place["id"], *where, turns=turns)
