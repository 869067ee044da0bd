"""The second step of captioning, as plain classes that run without Ray: pixels to outcomes, and their commit.

As in pipelines.steps.decoding, an outcome for each image in the order they came in, whatever happens to it.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.steps.decoding import pixels_of
from pipelines.steps.isolation import KILLED_WORKER, KILLED_WORKER_MESSAGE, Isolation, RunStopped
from pipelines.steps.ledger import LedgerClient
from pipelines.steps.storage_faults import PUT_OFF
from sharegpt4v.captions.outcomes import commit_outcomes, read_committed
from sharegpt4v.dialogue import Completion, Image, Request, SamplingParams, Turn, sampling_seed
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.engine.handle import Engine, EngineClosed, EngineError, Handle
from sharegpt4v.gate import GateRules, check_caption
from sharegpt4v.images import StorageError
from sharegpt4v.prompts import Prompt
from sharegpt4v.records import IDENTITY_COLUMNS, OUTCOME, OUTCOMES
from sharegpt4v.run.disk import full_disk_named

log = logging.getLogger(__name__)

HUNG_EXIT_CODE = 86
"""A worker whose engine hangs or has died ends itself with this code, so that Ray starts another."""


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


_CARRIED = (*IDENTITY_COLUMNS, "image_sha256", "width", "height")
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
        ledger.ready(self._isolation.worker)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [
            _Row("decode" if reason else "", reason or "", message or "")
            for reason, message in zip(batch["reason"].to_pylist(), batch["message"].to_pylist(), strict=True)
        ]
        ids = batch["id"].to_pylist()
        pixels = pixels_of(batch)
        todo = [index for index, row in enumerate(rows) if not row.reason]
        # No more images than the engine processes at once are in progress, so that a death has few suspects.
        at_once = self._engine.capacity  # read once: an engine short of memory lowers it
        for start in range(0, len(todo), at_once):
            self._caption(ids, pixels, rows, todo[start : start + at_once])
        assert all(row.reason or row.completion for row in rows), "an image was passed over"
        return self._table(batch, rows)

    def account(self, outcomes: pa.Table) -> None:
        """Tells the ledger of a commit, a table of records.OUTCOMES, and what the engine has done so far.

        Raises RunStopped when too much has been rejected.
        """
        rejects = outcomes.filter(pc.equal(outcomes[OUTCOME], "reject"))
        reasons = Counter(rejects["reason"].to_pylist())
        example = f"{rejects['image'][0]}: {rejects['message'][0]}" if len(rejects) else ""
        first = outcomes["id"][0].as_py()
        stop = self._ledger.count(first, len(outcomes) - len(rejects), dict(reasons), example)
        self._ledger.report(self._isolation.worker, self._engine.stats())
        if stop:  # said here, too: images that were never decoded never begin
            raise RunStopped(stop)

    def _caption(self, ids: list[str], pixels: Sequence[Image], rows: list[_Row], members: list[int]) -> None:
        def work(positions: list[int]) -> None:
            self._attempt(ids, pixels, rows, [members[position] for position in positions])

        for position in self._isolation.run([ids[index] for index in members], work):
            rows[members[position]] = _Row("caption", KILLED_WORKER, KILLED_WORKER_MESSAGE)

    def _attempt(self, ids: list[str], pixels: Sequence[Image], rows: list[_Row], members: list[int]) -> None:
        """Makes a first try for all, then the retry for those the gate or the engine refused."""
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

    def _submit(self, key: str, pixels: Image, attempt: int, sampling: SamplingParams) -> Handle:
        return self._engine.submit(
            Request(
                id=key,
                turns=(Turn("user", self._rules.prompt.text, (pixels,)),),
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
        verdict = check_caption(completion.text, completion.finish_reason, self._rules.gate)
        if verdict:
            return _Row("gate", verdict.reason, verdict.message, attempt, completion)
        return _Row(attempt=attempt, completion=completion)

    def _wait(self, handle: Handle) -> Completion:
        """Waits while the engine makes progress; ends the process of an engine that makes none."""
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
        """Makes outcome rows in input order. A caption that the gate refused keeps only its text."""
        kept = [None if row.reason else row.completion for row in rows]
        columns: dict[str, Any] = {
            OUTCOME: ["reject" if row.reason else "caption" for row in rows],
            **{name: batch[name] for name in _CARRIED},
            "caption": [row.completion.text if row.completion else None for row in rows],
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
    """Caption, and its outcomes written to the folder `outcomes` before a call returns.

    In: a table of decoded_schema. Out: one row, `rows`: how many were committed; images that were put off
    have no outcome and are not. A commit from here needs no tasks of its own, and a call that Ray repeats
    writes the same file again instead of a second one.
    Raises StorageError where the folder is not seen, RunFailed where its disk is full, and RunStopped, after
    the commit, when too much has been rejected.
    """

    def __init__(
        self, outcomes: Path, spec: EngineSpec, rules: CaptionRules, ledger: LedgerClient, hang_seconds: float
    ) -> None:
        self._outcomes = outcomes
        self._caption = Caption(spec, rules, ledger, hang_seconds)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not self._outcomes.is_dir():  # asked before the work, which would be lost
            raise StorageError(
                f"{self._outcomes} is not there on {socket.gethostname()}: --out must be a folder that every "
                f"node sees"
            )
        batch = _without_put_off(batch)
        if not len(batch):
            return pa.table({"rows": [0]})
        table = read_committed(batch, self._outcomes)  # by a worker that died at a later commit of the block
        if table is None:
            table = self._caption(batch)
            with full_disk_named(self._outcomes):
                commit_outcomes(table, self._outcomes)
        self._caption.account(table)  # in both cases: it may have died before the ledger knew
        return pa.table({"rows": [len(table)]})


def _without_put_off(batch: pa.Table) -> pa.Table:
    put_off = pc.fill_null(pc.equal(batch["reason"], PUT_OFF), False)
    return batch.filter(pc.invert(put_off)) if pc.any(put_off).as_py() else batch


def _give_up(why: str) -> NoReturn:
    """Ends this process, whose engine is of no more use: Ray starts another, the ledger has its suspects."""
    log.error("%s: its process ends", why)
    os._exit(HUNG_EXIT_CODE)
