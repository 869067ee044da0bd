"""Reads training data of every kind into one memory-mapped file: flat memory, any record at once."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from sharegpt4v.atomic import atomic_path, write_atomic
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.train.conversations import Conversation, read_conversation
from sharegpt4v.train.sets import RawRecord, TrainingSet, iter_set

SCHEMA = pa.schema(
    [
        pa.field("set", pa.int16()),
        pa.field("id", pa.string()),
        pa.field("image", pa.string()),
        pa.field("container", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("image_turn", pa.int32()),
    ]
)
_ROWS = 1024
"""Records of a batch; all but the last have as many, so that a record is found by division."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation. root: where its image path starts. container, offset, size: as in a manifest."""

    id: str
    root: str | None
    image: str | None
    container: str
    offset: int
    size: int
    conversation: Conversation


@dataclass
class Intake:
    """What was read, kept as data.json. counts: usable records of each set. digest: over all records.

    dropped, repaired: records by reason. roots: where the image paths of each set start.
    """

    key: str
    roots: list[str | None] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    digest: str = ""


class Records:
    """All records of a folder that `take_in` wrote, by number; the file stays on disk."""

    def __init__(self, folder: Path) -> None:
        self.intake = Intake(**json.loads((folder / "data.json").read_text(encoding="utf-8")))
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / "records.arrow")))

    @classmethod
    def open(cls, folder: Path) -> Self:
        return cls(folder)

    def __len__(self) -> int:
        return sum(self.intake.counts)

    def __getitem__(self, number: int) -> Record:
        row = self._file.get_batch(number // _ROWS).slice(number % _ROWS, 1).to_pylist()[0]
        talk = Conversation(tuple(row["texts"]), row["image_turn"])
        root = self.intake.roots[row["set"]]
        where = (row["image"], row["container"], row["offset"], row["size"])
        return Record(row["id"], root, *where, conversation=talk)


def take_in(
    sets: Sequence[TrainingSet], root: str | None, folder: Path, *, one_round: bool = False
) -> Intake:
    """Writes records.arrow, dropped.jsonl and data.json, the last one last, unless the same are there.

    Files that have the same size and time as before are not read again. one_round: the stage takes one
    question and its answer. Raises UserError for data that cannot be read or are of several rounds there,
    for a set without a usable record, and for other data than the folder holds.
    """
    key = hashlib.sha256(json.dumps([[s.stamp() for s in sets], root]).encode()).hexdigest()
    known = folder / "data.json"
    before = Intake(**json.loads(known.read_text(encoding="utf-8"))) if known.exists() else None
    if before and before.key == key:
        return before
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(key, one_round)
    with atomic_path(folder / "records.arrow") as path, atomic_path(folder / "dropped.jsonl") as dropped:
        writer.write(sets, root, path, dropped)
        if before and before.digest != writer.intake.digest:
            raise UserError(
                f"changed since this run began ({sum(before.counts):,} records before, "
                f"{sum(writer.intake.counts):,} now): restore it, or give another `out`",
                field="data",
            )
    write_atomic(known, json.dumps(asdict(writer.intake), indent=1))
    return writer.intake


class _Writer:
    def __init__(self, key: str, one_round: bool) -> None:
        self.intake, self._one_round = Intake(key), one_round
        self._digest = hashlib.sha256()
        self._dropped: Counter[str] = Counter()
        self._repaired: Counter[str] = Counter()

    def write(self, sets: Sequence[TrainingSet], root: str | None, path: Path, dropped: Path) -> None:
        rows: list[dict[str, Any]] = []
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as out,
            open(dropped, "w", encoding="utf-8") as rejects,
        ):
            for number, each in enumerate(sets):
                count = 0
                for row in self._usable(each, number, root, rejects):
                    count += 1
                    rows.append(row)
                    if len(rows) == _ROWS:
                        out.write_batch(self._batch(rows))
                        rows = []
                self._close_set(each, count)
            if rows:
                out.write_batch(self._batch(rows))
        self.intake.dropped, self.intake.repaired = dict(self._dropped), dict(self._repaired)
        self.intake.digest = self._digest.hexdigest()

    def _usable(
        self, each: TrainingSet, number: int, root: str | None, rejects: Any
    ) -> Iterator[dict[str, Any]]:
        where, raws = iter_set(each, root)
        self.intake.roots.append(where)
        for raw in raws:
            try:
                talk = read_conversation(raw.turns, raw.image is not None)
            except Rejected as error:
                self._dropped[error.reason] += 1
                line = {"set": each.path, "id": raw.id, "reason": error.reason, "message": error.message}
                rejects.write(json.dumps(line, ensure_ascii=False) + "\n")
                continue
            if self._one_round and len(talk.texts) > 2:
                raise UserError(
                    f"{each.path}: {raw.id} has {len(talk.texts) // 2} rounds, and this stage takes a "
                    "question and its caption: that is for sft",
                    field="data",
                )
            if talk.repaired:
                self._repaired[talk.repaired] += 1
            yield _row(number, raw, talk)

    def _close_set(self, each: TrainingSet, count: int) -> None:
        if not count:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self._dropped.most_common(3))
            raise UserError(
                f"{each.path} holds no conversation to train on ({reasons or 'it is empty'})", field="data"
            )
        self.intake.counts.append(count)

    def _batch(self, rows: list[dict[str, Any]]) -> pa.RecordBatch:
        self._digest.update(json.dumps(rows, ensure_ascii=True).encode())
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _row(number: int, raw: RawRecord, talk: Conversation) -> dict[str, Any]:
    return {
        "set": number,
        "id": raw.id,
        "image": raw.image,
        "container": raw.container,
        "offset": raw.offset,
        "size": raw.size,
        "texts": list(talk.texts),
        "image_turn": talk.image_turn,
    }
