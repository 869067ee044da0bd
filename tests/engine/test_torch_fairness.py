"""Requests in progress do not wait for those that begin, and those that begin do not wait for ever."""

import time
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import pytest

from sharegpt4v.engine.handle import EngineBusy, EngineClosed, EngineError
from sharegpt4v.engine.stats import SECONDS_BOUNDS, Seconds
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from tests.engine.requests import make_request

LONG_PROMPT = "describe " * 60


def test_a_stream_pauses_for_one_part_of_a_prefill_at_a_time(adapter: Adapter) -> None:
    with closing(TorchEngine(adapter, "toy@0", capacity=32, prefill_tokens=64)) as engine:
        stream = engine.submit(
            replace(make_request(adapter, 0, max_new_tokens=700, min_new_tokens=700), stream=True)
        )
        while not engine.stats().new_tokens:
            time.sleep(0.001)
        before = engine.stats().new_tokens
        crowd = [engine.submit(make_request(adapter, n, LONG_PROMPT, max_new_tokens=1)) for n in range(1, 31)]
        for handle in crowd:
            handle.result(60)
        parts = (engine.stats().prompt_tokens - before) // 64
        # One step between any two parts: the stream took a token for each of them.
        assert engine.stats().new_tokens - before - len(crowd) >= parts - 2
        assert parts > 60
        stream.cancel()


def test_cancelled_prompts_leave_before_they_are_prefilled(adapter: Adapter) -> None:
    with closing(TorchEngine(adapter, "toy@0", capacity=32, prefill_tokens=16)) as engine:
        crowd = [engine.submit(make_request(adapter, n, LONG_PROMPT)) for n in range(32)]
        while not engine.stats().prompt_tokens:
            time.sleep(0.001)
        for handle in crowd:
            handle.cancel()
        assert {handle.result(60).finish_reason for handle in crowd} == {"cancelled"}
        stats = engine.stats()
        assert stats.prompt_tokens < 16 * engine.count(crowd[0].request.turns)
        assert stats.cancelled == 32 and stats.running == stats.queued == 0


def test_few_requests_begin_though_slots_for_a_group_are_not_free(adapter: Adapter) -> None:
    """Of 64 slots a group is four: three free ones would stay empty as long as the others run."""
    with closing(TorchEngine(adapter, "toy@0", capacity=64)) as engine:
        busy = [
            engine.submit(make_request(adapter, n, "Hi", max_new_tokens=900, min_new_tokens=900))
            for n in range(61)
        ]
        while engine.stats().running < 61:
            time.sleep(0.01)
        few = [engine.submit(make_request(adapter, n, "Hi", max_new_tokens=2)) for n in range(100, 104)]
        for handle in few:
            handle.result(60)
        assert not any(handle.done() for handle in busy)
        for handle in busy:
            handle.cancel()


def test_a_full_queue_refuses_and_a_draining_engine_finishes(adapter: Adapter) -> None:
    with closing(TorchEngine(adapter, "toy@0", capacity=1, max_queue=2)) as engine:
        first = engine.submit(make_request(adapter, 0, max_new_tokens=300, min_new_tokens=300))
        while not engine.stats().running:
            time.sleep(0.001)
        waiting = [engine.submit(make_request(adapter, n)) for n in (1, 2)]
        with pytest.raises(EngineBusy, match="2 requests wait") as raised:
            engine.submit(make_request(adapter, 3))
        assert raised.value.kind == "overloaded"
        assert not engine.drain(0.01)
        with pytest.raises(EngineClosed, match="is closing"):
            engine.submit(make_request(adapter, 4))
        assert engine.drain(60)
        assert all(handle.done() for handle in (first, *waiting))


def test_errors_say_whose_fault_they_are(adapter: Adapter) -> None:
    with closing(TorchEngine(adapter, "toy@0", capacity=1, max_context=64)) as engine:
        too_long = engine.submit(make_request(adapter, 1, LONG_PROMPT * 2))
        endless = make_request(adapter, 2, "Hi", max_new_tokens=900, min_new_tokens=20)
        late = engine.submit(replace(endless, timeout=0.0))
        for handle, kind in ((too_long, "bad_request"), (late, "timeout")):
            with pytest.raises(EngineError) as raised:
                handle.result(60)
            assert raised.value.kind == kind


def test_a_closed_engine_holds_nothing_and_says_so(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=2)
    handles = [engine.submit(make_request(adapter, n, max_new_tokens=900)) for n in range(5)]
    while not engine.stats().running:
        time.sleep(0.001)
    engine.close()
    assert all(handle.done() for handle in handles)
    stats = engine.stats()
    assert (stats.running, stats.queued) == (0, 0)


def test_times_of_an_answer_and_histograms(adapter: Adapter) -> None:
    with closing(TorchEngine(adapter, "toy@0", capacity=1)) as engine:
        began = time.monotonic()
        handles = [
            engine.submit(make_request(adapter, n, max_new_tokens=20, min_new_tokens=20)) for n in (1, 2)
        ]
        answers = [handle.result(60) for handle in handles]
        whole = time.monotonic() - began
        for answer, request in zip(answers, handles, strict=True):
            assert answer.prompt_tokens == engine.count(request.request.turns)
            assert len(answer.token_ids) == answer.tokens == 20
            assert 0 <= answer.queued_seconds < answer.first_token_seconds < whole
        assert answers[1].queued_seconds > answers[0].first_token_seconds
        latencies = engine.latencies()
        assert (sum(latencies.first_token.counts), sum(latencies.next_token.counts)) == (2, 38)
        assert latencies.first_token.sum == pytest.approx(
            sum(answer.first_token_seconds for answer in answers), rel=0.01
        )
        assert engine.last_progress > began


def test_bounds_of_histograms_ascend() -> None:
    assert all(one < other for one, other in pairwise(SECONDS_BOUNDS))
    seconds = Seconds()
    for value in (0.0005, 0.001, 61.0):
        seconds.add(value)
    assert (seconds.counts[0], seconds.counts[-1], sum(seconds.counts)) == (2, 1, 3)
