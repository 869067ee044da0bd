"""The fake engine is deterministic and fails as its options say."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.engine.handle import EngineClosed, EngineError


def _request(key: str, shade: int = 0, temperature: float = 0.0, seed: int = 1) -> Request:
    image = np.full((8, 8, 3), shade, np.uint8)
    sampling = SamplingParams(temperature=temperature, seed=seed)
    return Request(key, (Turn("user", "?", (image,)),), sampling)


def test_the_answer_depends_on_the_pixels_and_not_on_the_id() -> None:
    engine = FakeEngine(FakeOptions())
    same = [engine.submit(_request(key, 7)).result(5).text for key in ("a", "b")]
    other = engine.submit(_request("c", 8)).result(5).text
    engine.close()
    assert same[0] == same[1] != other


def test_sampling_draws_from_the_seed() -> None:
    engine = FakeEngine(FakeOptions())
    answers = [engine.submit(_request("a", 7, 0.7, seed)).result(5).text for seed in (1, 1, 2)]
    engine.close()
    assert answers[0] == answers[1] != answers[2]


def test_one_failing_request_leaves_the_others_alone() -> None:
    engine = FakeEngine(FakeOptions(faults={"error": "^bad$"}))
    handles = [engine.submit(_request(key)) for key in ("good", "bad", "fine")]
    with pytest.raises(EngineError):
        handles[1].result(5)
    assert handles[0].result(5).text == handles[2].result(5).text
    assert (engine.stats().requests, engine.stats().failed) == (2, 1)
    engine.close()


def test_closing_fails_what_hangs_and_refuses_what_comes() -> None:
    engine = FakeEngine(FakeOptions(faults={"hang": "."}))
    handles = [engine.submit(_request(key)) for key in ("a", "b")]
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosed):
            handle.result(5)
    with pytest.raises(EngineClosed):
        engine.submit(_request("c"))


def test_a_cancelled_request_is_not_answered() -> None:
    engine = FakeEngine(FakeOptions(seconds_per_request=0.05))
    handles = [engine.submit(_request(key)) for key in ("a", "b")]
    handles[1].cancel()
    assert handles[1].result(5).finish_reason == "cancelled"
    assert handles[0].result(5).finish_reason == "stop"
    engine.close()


def test_an_answer_that_cannot_be_made_fails_its_request_alone() -> None:
    engine = FakeEngine(FakeOptions(faults={"error": "nothing"}))
    unnamed = replace(_request("x"), id=7)  # type: ignore[arg-type]
    handles = [engine.submit(unnamed), engine.submit(_request("y"))]
    with pytest.raises(EngineError, match="expected string"):
        handles[0].result(10)
    assert handles[1].result(10).text
    engine.close()


def test_kill_ends_the_process_with_sigkill() -> None:
    code = (
        "from tests.engine.test_fake import _request\n"
        "from sharegpt4v.engine.fake import FakeEngine, FakeOptions\n"
        "FakeEngine(FakeOptions(faults={'kill': 'x'})).submit(_request('x')).result(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "platform:."})
    assert done.returncode == -signal.SIGKILL


def test_an_unknown_fault_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^faults: 'explode' is unknown; known: kill"):
        FakeOptions(faults={"explode": "."})


# As a real engine


@contextmanager
def _running(**options: Any) -> Iterator[FakeEngine]:
    with closing(FakeEngine(FakeOptions(**options))) as engine:
        yield engine


def _asking(key: str, stream: bool = False, timeout: float | None = None, **sampling: Any) -> Request:
    return replace(_request(key), sampling=SamplingParams(**sampling), stream=stream, timeout=timeout)


def test_requests_run_beside_each_other_up_to_the_capacity() -> None:
    with _running(seconds_per_request=0.4, requests_at_once=4) as engine:
        start = time.monotonic()
        handles = [engine.submit(_request(str(number))) for number in range(8)]
        time.sleep(0.1)
        assert (engine.stats().running, engine.stats().queued) == (4, 4)
        for handle in handles:
            handle.result(10)
        assert 0.8 <= time.monotonic() - start < 1.6  # two rounds, not eight
    assert engine.stats().slots == engine.capacity == 4


def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    with _running(seconds_per_request=1.0, requests_at_once=2) as engine:
        long = engine.submit(_request("long"))
        for number in range(3):  # one after another in the other slot
            engine.submit(_asking(f"short {number}", max_new_tokens=1)).result(10)
        assert not long.done()


def test_pieces_come_one_by_one_and_join_to_the_text() -> None:
    with _running(seconds_per_request=0.3) as engine:
        handle = engine.submit(_asking("a", stream=True))
        times, pieces = [], []
        for piece in handle:
            pieces.append(piece)
            times.append(time.monotonic())
        whole = engine.submit(_asking("b")).result(10)
        assert "".join(pieces) == handle.result(0).text == whole.text
        assert len(pieces) == whole.tokens - 1 >= 12  # all but the end token
        assert times[-1] - times[0] > 0.15
        assert list(engine.submit(_asking("c")))[0] == whole.text  # not streamed: one piece


@pytest.mark.parametrize("stream", [False, True])
def test_limits_and_stop_strings_are_kept(stream: bool) -> None:
    with _running() as engine:

        def ask(**sampling: Any) -> tuple[str, int, str]:
            handle = engine.submit(_asking("a", stream=stream, **sampling))
            pieces, answer = "".join(handle), handle.result(0)
            assert pieces == answer.text
            return answer.text, answer.tokens, answer.finish_reason

        whole, tokens, reason = ask()
        assert (tokens % 12, reason) == (1, "stop")
        words = whole.split()
        assert ask(max_new_tokens=3) == (" ".join(words[:3]), 3, "length")
        assert ask(max_new_tokens=tokens - 1) == (whole, tokens - 1, "length")
        assert ask(max_new_tokens=tokens) == (whole, tokens, "stop")
        assert ask(stop=("stands",)) == (" ".join(words[:3]), 4, "stop")
        assert ask(stop=("nowhere", "beside a")) == (" ".join(words[:4]), 6, "stop")
        assert ask(stop=(" ",)) == (words[0], 2, "stop")
        assert ask(stop=("stands",), max_new_tokens=2) == (" ".join(words[:2]), 2, "length")


def test_cancelling_and_closing_are_prompt() -> None:
    with _running(seconds_per_request=60.0) as engine:
        handles = [engine.submit(_request(str(number))) for number in range(64)]
        time.sleep(0.05)
        start = time.monotonic()
        handles[0].cancel()
        assert handles[0].result(5).finish_reason == "cancelled"
        assert time.monotonic() - start < 0.5
        start = time.monotonic()
    assert time.monotonic() - start < 0.5
    for handle in handles[1:]:
        with pytest.raises(EngineClosed):
            handle.result(0)


def test_a_request_expires_while_it_runs() -> None:
    with _running(seconds_per_request=60.0) as engine:
        start = time.monotonic()
        with pytest.raises(EngineError, match="not finished within its 0.1 s"):
            engine.submit(_asking("a", timeout=0.1)).result(5)
        assert time.monotonic() - start < 1


def test_a_slow_answer_makes_progress_that_a_watchdog_sees() -> None:
    with _running(seconds_per_request=2.0) as engine:
        engine.submit(_request("a"))
        time.sleep(0.3)
        before = engine.stats()
        time.sleep(0.5)
        assert engine.stats() != before and engine.stats().new_tokens > before.new_tokens
        assert (before.begun, before.requests) == (1, 0) and before.mean_ttft < 0.3


def test_an_abandoned_stream_frees_its_slot() -> None:
    """A server's client that leaves: 32 of 32 slots were still busy a second later."""

    async def leave(engine: FakeEngine) -> None:
        async with engine.submit(_asking("a", stream=True)) as handle:
            async for _ in handle:
                break
        task = asyncio.create_task(_await(engine, "b"))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.3)

    with _running(seconds_per_request=5.0, requests_at_once=2) as engine:
        asyncio.run(leave(engine))
        assert (engine.stats().running, engine.stats().queued) == (0, 0)


async def _await(engine: FakeEngine, key: str) -> str:
    return (await engine.submit(_request(key))).text
