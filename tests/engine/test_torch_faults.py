"""What goes wrong in the torch engine costs the request at fault, and no other."""

import threading
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.engine import slots
from sharegpt4v.engine.failures import is_out_of_memory
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter
from tests.engine.requests import PROMPTS, make_request, reference, watch_sampling


def test_a_prompt_longer_than_the_context_is_named_with_both_numbers(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=2, max_context=64)
    long, short = (
        make_request(adapter, 1, "describe " * 80),
        make_request(adapter, 2, "Hi", max_new_tokens=500, min_new_tokens=500),
    )
    first, second = engine.submit(long), engine.submit(short)
    [prompt, other] = adapter.embed([long, short])
    with pytest.raises(EngineError, match=f"{len(prompt)} tokens and the context 64"):
        first.result(60)
    answer = second.result(60)  # ends where the context does
    engine.close()
    assert (answer.tokens, answer.finish_reason) == (
        64 - len(other),
        "length",
    )


def test_a_request_may_be_cancelled_at_any_time(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1)
    running = engine.submit(make_request(adapter, 1, max_new_tokens=900, min_new_tokens=900))
    waiting = engine.submit(make_request(adapter, 2))
    waiting.cancel()
    assert waiting.result(5).finish_reason == "cancelled"  # while the only slot is taken
    assert not running.done()
    running.cancel()
    answer = running.result(5)
    assert answer.finish_reason == "cancelled" and answer.tokens < 900
    running.cancel()  # afterwards it does nothing
    assert engine.submit(make_request(adapter, 3)).result(60).tokens > 0
    engine.close()


def test_a_request_cancelled_during_prefill_ends_there(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = threading.Event()

    def cancel(seeds: dict[int, int], logits: torch.Tensor) -> None:
        if 1 in seeds.values():
            submitted.wait(10)
            handles[1].cancel()

    watch_sampling(monkeypatch, cancel)
    engine = TorchEngine(adapter, "toy@0", capacity=4)
    requests = [make_request(adapter, number) for number in range(3)]
    handles = [engine.submit(request) for request in requests]
    submitted.set()
    answer = handles[1].result(60)
    assert (answer.finish_reason, answer.tokens, answer.text) == ("cancelled", 1, "")
    for number in (0, 2):
        completion = handles[number].result(60)
        assert (completion.text, completion.tokens) == reference(adapter, requests[number])
    engine.close()


def test_a_request_whose_time_is_over_fails_and_frees_its_slot(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1)
    endless = make_request(adapter, 1, max_new_tokens=900, min_new_tokens=900)
    with pytest.raises(EngineError, match=r"within its 0.2 s, after \d+ tokens"):
        engine.submit(replace(endless, timeout=0.2)).result(60)
    assert engine.submit(make_request(adapter, 3)).result(60).tokens > 0
    engine.close()


def _assert_all_right_but_r2(adapter: Adapter, handles: list[Handle]) -> None:
    for handle in handles:
        if handle.request.id != "r2":
            completion = handle.result(60)
            assert (completion.text, completion.tokens) == reference(adapter, handle.request)


def _fail_with_r2(seeds: dict[int, int], logits: torch.Tensor) -> None:
    if 2 in seeds.values():
        raise RuntimeError("shape mismatch")


def test_logits_that_are_no_numbers_fail_their_request_alone(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(seeds: dict[int, int], logits: torch.Tensor) -> None:
        for row, seed in enumerate(seeds.values()):
            if seed == 2:
                logits[row] = torch.nan

    watch_sampling(monkeypatch, poison)
    engine = TorchEngine(adapter, "toy@0", capacity=8)
    handles = [engine.submit(make_request(adapter, number)) for number in range(5)]
    with pytest.raises(EngineError, match="not numbers after 0 tokens"):
        handles[2].result(60)
    _assert_all_right_but_r2(adapter, handles)
    engine.close()


def test_a_slot_that_held_no_numbers_serves_the_next_request(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_BYTES_OF_A_CALL", 2**60)  # attention over all slots together, behind a mask
    requests = [
        make_request(adapter, 1, PROMPTS[0] * 3, max_new_tokens=30, min_new_tokens=30),
        make_request(
            adapter, 2, max_new_tokens=60
        ),  # longer: what comes next attends as far as this one stands
        make_request(adapter, 3, max_new_tokens=5),
    ]

    def poison(seeds: dict[int, int], logits: torch.Tensor) -> None:
        for row, (slot, seed) in enumerate(seeds.items()):
            if seed == 1:
                for tensor in (*engine._decoder.cache.keys, *engine._decoder.cache.values):
                    tensor[slot] = torch.nan
                logits[row] = torch.nan

    watch_sampling(monkeypatch, poison)
    engine = TorchEngine(adapter, "toy@0", capacity=2)
    handles = [engine.submit(request) for request in requests]
    with pytest.raises(EngineError, match="not numbers"):
        handles[0].result(60)
    for request, handle in zip(requests[1:], handles[1:], strict=True):
        assert (handle.result(60).text, handle.result(60).tokens) == reference(adapter, request)
    engine.close()


def test_a_failing_step_costs_only_the_request_at_fault(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_sampling(monkeypatch, _fail_with_r2)
    engine = TorchEngine(adapter, "toy@0", capacity=4)
    handles = [engine.submit(make_request(adapter, number)) for number in range(9)]
    with pytest.raises(EngineError, match="RuntimeError: shape mismatch"):
        handles[2].result(60)
    _assert_all_right_but_r2(adapter, handles)
    assert engine.stats().failed == 1
    engine.close()


def test_what_shares_a_failing_step_is_tried_again_together(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_sampling(monkeypatch, _fail_with_r2)
    engine = TorchEngine(adapter, "toy@0", capacity=8)
    requests = [make_request(adapter, number, min_new_tokens=12) for number in range(8)]
    handles = [engine.submit(request) for request in requests]
    for handle in handles:
        if handle.request.id != "r2":
            assert handle.result(60).tokens == 12
    engine.close()
    steps = engine.stats().slot_steps // 8
    assert steps <= 4 * 11, "one after the other they would take 7 * 11"


def test_a_lack_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_out_of_memory_halves_the_slots_once_and_loses_nothing(
    adapter: Adapter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tight(seeds: dict[int, int], logits: torch.Tensor) -> None:
        if len(seeds) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    watch_sampling(monkeypatch, tight)
    engine = TorchEngine(adapter, "toy@0", capacity=8)
    requests = [replace(make_request(adapter, number), stream=True) for number in range(12)]
    handles = [engine.submit(request) for request in requests]
    for request, handle in zip(requests, handles, strict=True):
        assert (handle.result(60).text, handle.result(60).tokens) == reference(adapter, request)
        assert "".join(handle) == handle.result().text
    assert engine.stats().slots == engine.capacity == 4
    assert "goes on with 4" in caplog.text
    engine.close()


def test_out_of_memory_again_ends_the_engine_and_says_so(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(seeds: dict[int, int], logits: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watch_sampling(monkeypatch, full)
    engine = TorchEngine(adapter, "toy@0", capacity=8)
    with pytest.raises(EngineError, match="out of memory with 4 slots"):
        engine.submit(make_request(adapter, 1)).result(60)
    with pytest.raises(EngineClosed):
        engine.submit(make_request(adapter, 2))


def test_closing_fails_what_runs_and_what_waits(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1)
    handles = [
        engine.submit(make_request(adapter, n, max_new_tokens=900, min_new_tokens=900)) for n in range(3)
    ]
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosed):
            handle.result(5)


def test_an_object_that_is_no_request_fails_alone(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=2)
    wrong = replace(make_request(adapter, 1), timeout="5")  # type: ignore[arg-type]
    good = make_request(adapter, 2)
    with pytest.raises(EngineError, match="not supported between"):
        engine.submit(wrong).result(60)
    assert engine.submit(good).result(60).tokens > 0
    engine.close()


def test_a_tokenizer_beyond_the_table_fails_its_request_before_the_device_does(adapter: Adapter) -> None:
    """On a GPU an index out of range ends the process."""
    rows = adapter.language_model.get_input_embeddings().num_embeddings
    with mock.patch.object(adapter.template, "segments", return_value=[[1, rows]]):
        with pytest.raises(UserError, match=f"a table of {rows} rows and its tokenizer gives {rows}"):
            adapter.embed([Request("text", (Turn("user", "?"),))])


def test_half_of_a_surrogate_pair_in_a_prompt_is_answered(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=2)
    assert engine.submit(make_request(adapter, 1, "What is \ud83d here?")).result(60).tokens > 0
    engine.close()


@pytest.mark.parametrize("sizes", [{"capacity": 0}, {"capacity": 2, "max_context": -5}])
def test_an_engine_without_room_is_refused(adapter: Adapter, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both begin at 1"):
        TorchEngine(adapter, "toy@0", **sizes)
