"""The steps of captioning, as plain classes that run without Ray: decode, caption, commit.

Each takes a batch of columns and gives one back in the same order, one row for each image whatever
happens to it: an output in completion order loses and doubles rows when Ray repeats a call.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.isolation import Isolation, RunStopped
from pipelines.ledger import LedgerClient
from pipelines.pixel_memory import pixel_memory
from sharegpt4v.engine.base import (
    Completion,
    Engine,
    EngineClosed,
    EngineError,
    Handle,
    Request,
    SamplingParams,
    Turn,
    sampling_seed,
)
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.errors import Rejected
from sharegpt4v.gate import GateRules, judge
from sharegpt4v.images import ImageReader, prepare
from sharegpt4v.images import Protocol as ImageProtocol
from sharegpt4v.prompts import Prompt
from sharegpt4v.records import OUTCOME, OUTCOMES, PENDING
from sharegpt4v.run.pending import commit_outcomes

log = logging.getLogger(__name__)

HUNG_EXIT_CODE = 86
"""A worker whose engine hangs or has died ends itself with this code, so that Ray starts another."""

KILLED_WORKER = "killed_worker"
KILLED_WORKER_MESSAGE = "its process died each time this image was in work, twice with nothing else in it"


WHO = ("shard", "row", "id", "image", "source")
"""Columns of records.PENDING that go through every step as they are."""

PLACE = ("image", "container", "offset", "size")
"""Columns of records.PENDING that say where an image lies, in the order ImageReader.read takes them."""


def decoded_schema(size: int) -> pa.Schema:
    """What Decode gives: who the image is, its pixels (size, size, 3) uint8 RGB, or the reason for none."""
    return pa.schema(
        [
            *[PENDING.field(name) for name in WHO],
            pa.field("pixels", pa.fixed_shape_tensor(pa.uint8(), (size, size, 3))),
            *[OUTCOMES.field(name) for name in ("image_sha256", "width", "height", "reason", "message")],
        ]
    )


def read_row_group(batch: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one row group: columns file and row_group (one row) in, that file's or `columns` out."""
    [place] = batch.to_pylist()
    return pq.ParquetFile(place["file"]).read_row_group(place["row_group"], columns=columns)


class Decode:
    """Bytes to uint8 pixels at model size.

    In: a table of records.PENDING. Out: a table of decoded_schema; a row that cannot be decoded has a reason,
    a message and black pixels.
    """

    def __init__(
        self, reader: ImageReader, size: int, protocol: ImageProtocol, fast: bool, ledger: LedgerClient
    ) -> None:
        self._reader = reader
        self._size = size
        self._protocol = protocol
        self._fast = fast
        self._ledger = ledger

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [_Decoded() for _ in range(len(batch))]
        pixels = pixel_memory((len(batch), self._size, self._size, 3))
        places = list(zip(*(batch[name].to_pylist() for name in PLACE), strict=True))

        def work(positions: list[int]) -> None:
            for position in positions:
                rows[position] = self._decode(places[position], pixels[position])

        # A task has its process to itself, so the ledger's name for it may be as short-lived as the call.
        isolation = Isolation(self._ledger, "decode")
        for position in isolation.run(batch["id"].to_pylist(), work):
            rows[position] = _Decoded(reason=KILLED_WORKER, message=KILLED_WORKER_MESSAGE)
        for position, row in enumerate(rows):
            if row.reason:
                pixels[position] = 0
        columns = {
            **{name: batch[name] for name in WHO},
            "pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
            **{field.name: [getattr(row, field.name) for row in rows] for field in fields(_Decoded)},
        }
        schema = decoded_schema(self._size)
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def _decode(self, place: tuple[str, str, int, int], pixels: npt.NDArray[np.uint8]) -> "_Decoded":
        """Fills `pixels` (S, S, 3), or says why not."""
        digest = ""
        try:
            data = self._reader.read(*place)
            digest = hashlib.sha256(data).hexdigest()
            prepared = prepare(data, self._size, self._protocol, fast=self._fast)
        except Rejected as rejected:
            return _Decoded(digest, reason=rejected.reason, message=rejected.message)
        pixels[:] = prepared.pixels
        return _Decoded(digest, prepared.width, prepared.height)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The columns of decoded_schema that decoding finds out, but for the pixels."""

    image_sha256: str = ""
    width: int = 0
    height: int = 0
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """What an answer must be, and how it is asked for. All of it is part of the fingerprint."""

    prompt: Prompt
    sampling: SamplingParams
    retry: SamplingParams
    gate: GateRules


@dataclass(slots=True)
class _Row:
    """The outcome of one image, growing as attempts end."""

    stage: str = ""
    reason: str = ""
    message: str = ""
    attempt: int = 0
    completion: Completion | None = None


_CARRIED = (*WHO, "image_sha256", "width", "height")
"""Columns that go from Decode to the outcome as they are."""


class Caption:
    """Pixels to outcomes through an engine, the gate, and one retry with other sampling.

    In: a table of decoded_schema. Out: a table of records.OUTCOMES. Several threads may call it at once;
    their images meet in the engine.
    """

    def __init__(
        self, spec: EngineSpec, rules: CaptionRules, ledger: LedgerClient, hang_seconds: float
    ) -> None:
        self._engine: Engine = build_engine(spec)
        self._rules = rules
        self._ledger = ledger
        self._hang_seconds = hang_seconds
        self._isolation = Isolation(ledger, "caption")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [
            _Row("decode" if reason else "", reason or "", message or "")
            for reason, message in zip(batch["reason"].to_pylist(), batch["message"].to_pylist(), strict=True)
        ]
        ids = batch["id"].to_pylist()
        column = batch["pixels"]  # one chunk as a rule, and combine_chunks would copy even that
        pixels = (column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()).to_numpy_ndarray()
        todo = [index for index, row in enumerate(rows) if not row.reason]
        # No more than the engine works on at once is held in work, so that a death has few suspects.
        at_once = self._engine.capacity  # read once: an engine short of memory lowers it
        for start in range(0, len(todo), at_once):
            self._caption(ids, pixels, rows, todo[start : start + at_once])
        assert all(row.reason or row.completion for row in rows), "an image was passed over"
        self._count(batch, rows)
        return self._table(batch, rows)

    def _count(self, batch: pa.Table, rows: list[_Row]) -> None:
        """Tells the ledger what became of them. Raises RunStopped when too much has been rejected."""
        reasons = Counter(row.reason for row in rows if row.reason)
        first = next((index for index, row in enumerate(rows) if row.reason), None)
        example = "" if first is None else f"{batch['image'][first]}: {rows[first].message}"
        stop = self._ledger.count(len(rows) - reasons.total(), dict(reasons), example)
        if stop:  # said here, too: images that were never decoded never begin
            raise RunStopped(stop)

    def _caption(
        self, ids: list[str], pixels: npt.NDArray[np.uint8], rows: list[_Row], members: list[int]
    ) -> None:
        def work(positions: list[int]) -> None:
            self._attempt(ids, pixels, rows, [members[position] for position in positions])

        for position in self._isolation.run([ids[index] for index in members], work):
            rows[members[position]] = _Row("caption", KILLED_WORKER, KILLED_WORKER_MESSAGE)

    def _attempt(
        self, ids: list[str], pixels: npt.NDArray[np.uint8], rows: list[_Row], members: list[int]
    ) -> None:
        """First try for all, then the retry for those the gate or the engine refused."""
        for attempt, sampling in enumerate((self._rules.sampling, self._rules.retry)):
            try:
                handles = [
                    (index, self._submit(ids[index], pixels[index], attempt, sampling)) for index in members
                ]
            except EngineClosed as error:
                _give_up(str(error))
            for index, handle in handles:
                rows[index] = self._outcome(handle, attempt)
            members = [index for index in members if rows[index].reason]

    def _submit(
        self, key: str, pixels: npt.NDArray[np.uint8], attempt: int, sampling: SamplingParams
    ) -> Handle:
        return self._engine.submit(
            Request(
                id=key,
                turns=(Turn("user", self._rules.prompt.text),),
                images=(pixels,),
                sampling=replace(sampling, seed=sampling_seed(key, attempt)),
            )
        )

    def _outcome(self, handle: Handle, attempt: int) -> _Row:
        try:
            completion = self._wait(handle)
        except EngineClosed as error:
            _give_up(str(error))
        except EngineError as error:
            return _Row("caption", "engine_error", str(error), attempt)
        verdict = judge(completion.text, completion.finish_reason, self._rules.gate)
        if verdict:
            return _Row("gate", verdict.reason, verdict.message, attempt)
        return _Row(attempt=attempt, completion=completion)

    def _wait(self, handle: Handle) -> Completion:
        """Waits as long as the engine gets on; an engine that does not takes its process with it."""
        before = self._engine.stats()
        while True:
            try:
                return handle.result(self._hang_seconds)
            except TimeoutError:
                now = self._engine.stats()
                if now == before:
                    _give_up(f"the engine did nothing for {self._hang_seconds:.0f} s")
                before = now

    def _table(self, batch: pa.Table, rows: list[_Row]) -> pa.Table:
        """Outcome rows in input order; the fields of the other half are null."""
        kept = [row.completion for row in rows]
        columns: dict[str, Any] = {
            OUTCOME: ["reject" if row.reason else "caption" for row in rows],
            **{name: batch[name] for name in _CARRIED},
            "caption": [c.text if c else None for c in kept],
            "prompt_id": [self._rules.prompt.id if c else None for c in kept],
            "model": [self._engine.model if c else None for c in kept],
            "tokens": [c.tokens if c else None for c in kept],
            "finish_reason": [c.finish_reason if c else None for c in kept],
            "attempt": [row.attempt for row in rows],
            "stage": [row.stage if row.reason else None for row in rows],
            "reason": [row.reason or None for row in rows],
            "message": [row.message if row.reason else None for row in rows],
        }
        return pa.table({name: columns[name] for name in OUTCOMES.names}, schema=OUTCOMES)


class CaptionAndCommit:
    """Caption, and its outcomes written to `outcomes` before a call returns.

    In: a table of decoded_schema. Out: one row, `rows`: how many were committed. A commit from here needs no
    tasks of its own, and a call that Ray repeats writes the same file again instead of a second one.
    """

    def __init__(
        self, outcomes: Path, spec: EngineSpec, rules: CaptionRules, ledger: LedgerClient, hang_seconds: float
    ) -> None:
        self._outcomes = outcomes
        self._caption = Caption(spec, rules, ledger, hang_seconds)

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = self._caption(batch)
        commit_outcomes(table, self._outcomes)
        return pa.table({"rows": [len(table)]})


def _give_up(why: str) -> NoReturn:
    """Ends this process, whose engine is of no more use: Ray starts another, the ledger has its suspects."""
    log.error("%s: its process ends", why)
    os._exit(HUNG_EXIT_CODE)
