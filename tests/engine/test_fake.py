"""The fake engine is deterministic and fails as its options say."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
    engine = FakeEngine(FakeOptions())
    broken = replace(_request("x"), turns=(Turn("user", "?", (Path("no pixels"),)),))  # type: ignore[arg-type]
    handles = [engine.submit(broken), engine.submit(_request("y"))]
    with pytest.raises(EngineError, match="AttributeError"):
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
