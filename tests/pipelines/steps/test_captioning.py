"""Caption called as a plain object: one row an image, in order, whatever happens to it."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.steps import captioning
from pipelines.steps.captioning import HUNG_EXIT_CODE, Caption, CaptionAndCommit, CaptionRules
from pipelines.steps.decoding import decoded_schema
from pipelines.steps.isolation import RunStopped
from pipelines.steps.ledger import Ledger
from pipelines.steps.storage_faults import PUT_OFF
from pipelines.steps.suspects import Admission
from sharegpt4v.dialogue import Completion, Request, SamplingParams, SquareImages, WholeImages, sampling_seed
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.gate import GateRules
from sharegpt4v.images import StorageError
from sharegpt4v.prompts import Prompt
from sharegpt4v.records import OUTCOMES
from tests.commands import REPOSITORY, environment

SIZE = 8
RULES = CaptionRules(
    Prompt.of_user("Describe </s> USER: <image> it."),
    SamplingParams(max_new_tokens=40),
    SamplingParams(max_new_tokens=40, temperature=0.7, top_p=0.9),
    GateRules(),
)


def _decoded(*ids: str, reason: dict[str, str] | None = None) -> pa.Table:
    """What Decode gives for images of these ids; `reason` holds those that it rejected."""
    count, reasons = len(ids), reason or {}
    pixels = np.stack([np.full((SIZE, SIZE, 3), index, np.uint8) for index in range(count)])
    columns = {
        "shard": [0] * count,
        "row": list(range(count)),
        "id": list(ids),
        "image": [f"{key}.jpg" for key in ids],
        "source": ["coco"] * count,
        "pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
        "image_sha256": [f"{index:064}" for index in range(count)],
        "width": [64] * count,
        "height": [48] * count,
        "reason": [reasons.get(key) for key in ids],
        "message": [f"{key} is bad" if key in reasons else None for key in ids],
    }
    return pa.table(columns, schema=decoded_schema(SquareImages(SIZE, "squash")))


def _caption(ledger: Ledger | None = None, **fake: Any) -> Caption:
    spec = EngineSpec("fake", "fake@0", fake=FakeOptions(image_side=SIZE, **fake))
    return Caption(spec, RULES, ledger or Ledger(1.0), hang_seconds=30)


class _Recording:
    """An engine that answers at once what a function of the request says, and keeps every request."""

    model = "recording@0"

    def __init__(self, answer: Any, capacity: int = 1024) -> None:
        self.capacity = capacity
        self.requests: list[Request] = []
        self._answer = answer

    def submit(self, request: Request) -> Handle:
        self.requests.append(request)
        handle = Handle(request)
        handle.finish(self._answer(request))
        return handle

    def stats(self) -> EngineStats:
        return EngineStats()

    def close(self) -> None:
        return


GOOD = Completion("A red cup stands on a table in the evening light.", 12, "stop")
REFUSAL = Completion("I'm sorry, but I cannot help with this image.", 11, "stop")


def _with(engine: _Recording, monkeypatch: pytest.MonkeyPatch, ledger: Ledger | None = None) -> Caption:
    monkeypatch.setattr(captioning, "build_engine", lambda spec: engine)
    return Caption(EngineSpec("fake", "recording@0"), RULES, ledger or Ledger(1.0), hang_seconds=30)


def test_caption_keeps_the_order_and_the_schema() -> None:
    ids = [f"{index}" for index in range(9)]
    table = _caption(requests_at_once=4)(_decoded(*ids, reason={"3": "truncated"}))
    assert table.schema == OUTCOMES
    assert table["id"].to_pylist() == ids and table["row"].to_pylist() == list(range(9))
    assert table["outcome"].to_pylist() == ["reject" if key == "3" else "caption" for key in ids]
    row = table.slice(0, 1).to_pylist()[0]
    assert row["prompt_id"] == RULES.prompt.id and row["model"] == "fake@0"
    assert (row["attempt"], row["finish_reason"], row["image_sha256"]) == (0, "stop", f"{0:064}")
    assert (row["stage"], row["reason"], row["message"]) == (None, None, None)
    assert row["tokens"] > 0 and len(row["caption"]) > 20


def test_a_decode_reject_never_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _Recording(lambda request: GOOD)
    table = _with(engine, monkeypatch)(_decoded("a", "bad", "b", reason={"bad": "truncated"}))
    assert [request.id for request in engine.requests] == ["a", "b"]
    row = table.to_pylist()[1]
    assert (row["stage"], row["reason"], row["message"]) == ("decode", "truncated", "bad is bad")
    assert row["caption"] is None and row["tokens"] is None and row["attempt"] == 0


def test_a_batch_of_rejects_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _caption()(_decoded("a", "b", reason={"a": "empty", "b": "missing"}))
    assert table["reason"].to_pylist() == ["empty", "missing"]


def test_the_first_attempt_is_greedy_and_the_retry_samples_with_a_seed_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _Recording(
        lambda request: REFUSAL if request.id != "good" and request.sampling.temperature == 0 else GOOD
    )
    table = _with(engine, monkeypatch)(_decoded("good", "late"))
    assert table["attempt"].to_pylist() == [0, 1]
    assert table["outcome"].to_pylist() == ["caption", "caption"]
    tried = [(request.id, request.sampling) for request in engine.requests]
    assert tried == [
        ("good", replace(RULES.sampling, seed=sampling_seed("good", 0))),
        ("late", replace(RULES.sampling, seed=sampling_seed("late", 0))),
        ("late", replace(RULES.retry, seed=sampling_seed("late", 1))),
    ]
    assert len({sampling.seed for _, sampling in tried}) == 3


def test_a_caption_refused_twice_is_a_reject_of_the_gate_at_attempt_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _Recording(lambda request: REFUSAL)
    row = _with(engine, monkeypatch)(_decoded("a")).to_pylist()[0]
    assert (row["outcome"], row["stage"], row["reason"], row["attempt"]) == ("reject", "gate", "refusal", 1)
    assert row["model"] is None and row["tokens"] is None
    assert len(engine.requests) == 2


def test_a_refused_caption_is_kept_with_its_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([REFUSAL, replace(REFUSAL, text="Too short.")])
    row = _with(_Recording(lambda request: next(texts)), monkeypatch)(_decoded("a")).to_pylist()[0]
    assert (row["reason"], row["caption"]) == ("too_short", "Too short.")


def test_an_engine_error_costs_one_image_and_is_tried_twice() -> None:
    ledger = Ledger(1.0)
    table = _caption(ledger, faults={"error": "^b$"})(_decoded("a", "b", "c"))
    assert table["outcome"].to_pylist() == ["caption", "reject", "caption"]
    row = table.to_pylist()[1]
    assert (row["stage"], row["reason"], row["attempt"]) == ("caption", "engine_error", 1)
    assert row["caption"] is None


def test_no_more_than_the_engine_holds_is_in_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Watched(Ledger):
        def begin(self, worker: str, ids: Sequence[str]) -> Admission:
            held.append(len(ids))
            return super().begin(worker, ids)

    engine = _Recording(lambda request: GOOD, capacity=2)
    _with(engine, monkeypatch, Watched(1.0))(_decoded("a", "b", "c", "d", "e"))
    assert held == [2, 2, 1]


def test_an_engine_that_gives_up_slots_passes_no_image_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shrinking(_Recording):
        def submit(self, request: Request) -> Handle:
            self.capacity = 2  # as an engine does that ran out of memory
            return super().submit(request)

    table = _with(Shrinking(lambda request: GOOD, capacity=4), monkeypatch)(_decoded(*map(str, range(10))))
    assert table["caption"].to_pylist() == [GOOD.text] * 10


def test_texts_pass_unaltered(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A sign </s> says <image> USER: \u202e naïve\r\n\tcafé <TOKENS_UNUSED_1>, in the light of day."
    engine = _Recording(lambda request: Completion(text, 20, "stop"))
    table = _with(engine, monkeypatch)(_decoded("id with </s> and 漢字"))
    assert table["caption"].to_pylist() == [text]
    assert table["id"].to_pylist() == ["id with </s> and 漢字"]
    assert engine.requests[0].turns[0].text == RULES.prompt.text
    assert (engine.requests[0].images[0] == 0).all()


def test_the_same_batch_gives_the_same_rows_again() -> None:
    faults = {"once": "1", "refusal": "2"}
    batch = _decoded("0", "1", "2", "3")
    assert _caption(faults=faults)(batch).equals(_caption(faults=faults, requests_at_once=1)(batch))


def test_a_stopped_run_stops_its_steps() -> None:
    ledger = Ledger(0.0)
    ledger.count("1", 0, {"missing": 1_000})
    with pytest.raises(RunStopped, match="missing"):
        _caption(ledger)(_decoded("a"))


def test_an_image_that_killed_its_actor_is_a_reject_and_never_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _Recording(lambda request: GOOD)
    ledger = Ledger(1.0)
    for worker in ("first", "second", "third"):
        ledger.begin(worker, ["caption:poison"])
        ledger.begin_alone(worker, "caption:poison")
    table = _with(engine, monkeypatch, ledger)(_decoded("a", "poison", "b"))
    assert table["reason"].to_pylist() == [None, "killed_worker", None]
    assert [request.id for request in engine.requests] == ["a", "b"]


def test_an_engine_that_is_slow_but_gets_on_is_not_hung() -> None:
    spec = EngineSpec("fake", "fake@0", fake=FakeOptions(image_side=SIZE, seconds_per_request=0.8))
    step = Caption(spec, RULES, Ledger(1.0), hang_seconds=0.25)
    table: pa.Table = step(_decoded(*map(str, range(8))))  # the first answer comes after 0.8 s
    assert table["outcome"].to_pylist() == ["caption"] * 8


def test_an_engine_that_stops_after_some_progress_is_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stalling(_Recording):
        done = iter([0, 1, 2, 2])

        def submit(self, request: Request) -> Handle:
            return Handle(request)  # which nobody will ever finish

        def stats(self) -> EngineStats:
            return EngineStats(requests=next(self.done))

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("pipelines.steps.captioning.os._exit", leave)
    engine = Stalling(lambda request: GOOD)
    monkeypatch.setattr(captioning, "build_engine", lambda spec: engine)
    step = Caption(EngineSpec("fake", "recording@0"), RULES, Ledger(1.0), hang_seconds=0.01)
    with pytest.raises(SystemExit) as left:
        step(_decoded("a"))
    assert left.value.code == HUNG_EXIT_CODE
    assert next(engine.done, None) is None  # it was asked until it stood still


def test_a_hung_engine_ends_its_process() -> None:
    script = """
from tests.pipelines.steps import test_captioning as t
spec = t.EngineSpec("fake", "fake@0", fake=t.FakeOptions(image_side=t.SIZE, faults={"hang": "b"}))
t.Caption(spec, t.RULES, t.Ledger(1.0), hang_seconds=0.2)(t._decoded("a", "b", "c"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == HUNG_EXIT_CODE == 86
    assert "the engine did nothing for 0 s: its process ends" in done.stderr


def _committing(folder: Path, ledger: Ledger | None = None, **fake: Any) -> CaptionAndCommit:
    spec = EngineSpec("fake", "fake@0", fake=FakeOptions(image_side=SIZE, **fake))
    return CaptionAndCommit(folder, spec, RULES, ledger or Ledger(1.0), hang_seconds=30)


def test_a_call_that_is_repeated_does_nothing_twice(tmp_path: Path) -> None:
    """A block is a few commits: after a death Ray Data gives all of it to another worker."""
    ledger = Ledger(1.0)
    step = _committing(tmp_path, ledger)
    batch = _decoded("a", "b", reason={"b": "missing"})
    assert [step(batch).to_pylist() for _ in range(2)] == [[{"rows": 2}]] * 2
    assert (ledger.tally().done, ledger.engines().requests) == (2, 1)
    [path] = tmp_path.rglob("*.parquet")
    assert pq.read_table(path).equals(_caption()(batch))


def test_a_commit_whose_worker_died_before_the_ledger_knew_is_counted_once(tmp_path: Path) -> None:
    batch, ledger = _decoded("a", "b", reason={"b": "missing"}), Ledger(1.0)
    _committing(tmp_path, Ledger(1.0))(batch)  # the dead one
    for _ in range(2):
        assert _committing(tmp_path, ledger)(batch)["rows"].to_pylist() == [2]
    assert (ledger.tally().captions, ledger.tally().reasons) == (1, {"missing": 1})


def test_a_block_cut_from_others_commits_each_image_with_its_own_pixels(tmp_path: Path) -> None:
    """Ray Data joins what is left of two row groups, and cuts blocks that grow too large."""
    first, second = _decoded(*"abcdef"), _decoded(*"uvwxyz")
    whole = {row["id"]: row["caption"] for batch in (first, second) for row in _caption()(batch).to_pylist()}
    step = _committing(tmp_path)
    step(pa.concat_tables([first.slice(4), second.slice(0, 3)]))
    step(first.slice(2, 2))
    rows = [row for path in sorted(tmp_path.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == ["c", "d", "e", "f", "u", "v", "w"]
    assert all(row["caption"] == whole[row["id"]] for row in rows)


def test_the_ledger_hears_what_was_committed_and_what_the_engine_has_done(tmp_path: Path) -> None:
    ledger = Ledger(1.0)
    step = _committing(tmp_path, ledger, faults={"error": "c"})
    step(_decoded("a", "b", reason={"b": "missing"}))
    assert ledger.engines().requests == 1
    step(_decoded("c", "d"))
    tally = ledger.tally()
    assert (tally.captions, tally.rejects, tally.reasons) == (2, 2, {"missing": 1, "engine_error": 1})
    assert (ledger.engines().requests, ledger.engines().failed) == (2, 2)


def test_a_run_that_stops_keeps_what_it_had_finished(tmp_path: Path) -> None:
    ledger = Ledger(0.0)
    ledger.count("2", 998, {})
    step = _committing(tmp_path, ledger)
    with pytest.raises(RunStopped, match=r"b\.jpg: b is bad"):
        step(_decoded("a", "b", "c", reason={"b": "missing", "c": "missing"}))
    [path] = tmp_path.rglob("*.parquet")
    assert len(pq.read_table(path)) == 3


def test_a_node_that_does_not_see_the_folder_is_told_before_the_work(tmp_path: Path) -> None:
    ledger = Ledger(1.0)
    with pytest.raises(StorageError, match=r"gone is not there on .*every node sees"):
        _committing(tmp_path / "gone", ledger)(_decoded("a"))
    assert ledger.engines().requests == 0 and not (tmp_path / "gone").exists()


def test_images_that_were_put_off_are_neither_captioned_nor_committed(tmp_path: Path) -> None:
    spec = EngineSpec("fake", "fake@0", fake=FakeOptions(image_side=SIZE))
    ledger = Ledger(0.0)
    step = CaptionAndCommit(tmp_path, spec, RULES, ledger, hang_seconds=30)
    assert step(_decoded("a", "b", "c", reason={"a": PUT_OFF, "c": "missing"}))["rows"].to_pylist() == [2]
    (file,) = tmp_path.iterdir()
    table = pq.read_table(file)
    assert table["id"].to_pylist() == ["b", "c"] and table["outcome"].to_pylist() == ["caption", "reject"]
    assert ledger.tally().reasons == {"missing": 1}
    assert step(_decoded("d", reason={"d": PUT_OFF}))["rows"].to_pylist() == [0]
    assert len(list(tmp_path.iterdir())) == 1


def test_whole_images_reach_the_engine_in_their_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.full((3 + index, 5, 3), index, np.uint8) for index in range(3)]
    squares = _decoded("a", "bad", "c", reason={"bad": "truncated"}).drop_columns("pixels")
    whole = squares.append_column("pixels", pa.array([i.tobytes() for i in images], pa.large_binary()))
    whole = whole.append_column("pixel_rows", pa.array([len(i) for i in images], pa.int32()))
    engine = _Recording(lambda request: GOOD)
    table = _with(engine, monkeypatch)(whole.select(decoded_schema(WholeImages(100)).names))
    assert table["outcome"].to_pylist() == ["caption", "reject", "caption"]
    assert [request.images[0].shape for request in engine.requests] == [(3, 5, 3), (5, 5, 3)]
    assert (engine.requests[1].images[0] == 2).all()
