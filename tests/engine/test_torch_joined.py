"""A step and a prefill in one pass: what fails in it is found as if each were computed alone."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch

from sharegpt4v.dialogue import Completion
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.llama import Attend, Places
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from tests.engine.requests import make_request

BAD_PROMPT = "Is this request at fault?"


def _streams(engine: TorchEngine, adapter: Adapter) -> list[Handle]:
    """Four that run: two are greedy, two are sampled."""
    handles = [
        engine.submit(
            make_request(
                adapter,
                n,
                max_new_tokens=150,
                min_new_tokens=150,
                temperature=float(n % 2),
                repetition_penalty=1.1,
            )
        )
        for n in range(4)
    ]
    while engine.stats().new_tokens < 8:
        time.sleep(0.001)
    return handles


def _undisturbed(adapter: Adapter) -> list[Completion]:
    with closing(TorchEngine(adapter, "toy@0", capacity=8)) as engine:
        return [handle.result(120) for handle in _streams(engine, adapter)]


def test_a_prompt_at_fault_leaves_the_streams_alone(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _undisturbed(adapter)
    bad = make_request(adapter, 9, BAD_PROMPT)
    length = adapter.prompt_tokens(bad.turns)
    joined = []

    class Failing(Decoder):
        def _of_spans(self, spans: Sequence[Span]) -> tuple[Places, Attend]:
            if any(span.end == length for span in spans):
                raise RuntimeError("shape mismatch")
            return super()._of_spans(spans)

        def step_and_prefill(self, positions: Mapping[int, int], prompts: Any) -> Any:
            joined.append(len(prompts))
            return super().step_and_prefill(positions, prompts)

    monkeypatch.setattr("sharegpt4v.engine.torch_engine.Decoder", Failing)
    with closing(TorchEngine(adapter, "toy@0", capacity=8)) as engine:
        streams = _streams(engine, adapter)
        good = make_request(adapter, 8)
        assert adapter.prompt_tokens(good.turns) != length
        handles = [engine.submit(request) for request in (bad, good)]
        with pytest.raises(EngineError, match="shape mismatch"):
            handles[0].result(60)
        assert handles[1].result(60).tokens
        found = [handle.result(120) for handle in streams]
    assert sum(joined), "no prefill was joined with a step"
    assert [handle.suspicions for handle in streams] == [0] * 4
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


def test_a_pass_that_failed_late_is_computed_again_from_the_same_state(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers were drawn and tokens set when it failed."""
    expected = _undisturbed(adapter)
    failures: list[int] = []

    class FailsOnce(Decoder):
        def step_and_prefill(
            self, positions: Mapping[int, int], prompts: Sequence[tuple[Span, torch.Tensor]]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            found = super().step_and_prefill(positions, prompts)
            if prompts and len(failures) < 3:
                failures.append(len(prompts))
                raise RuntimeError("once")
            return found

    monkeypatch.setattr("sharegpt4v.engine.torch_engine.Decoder", FailsOnce)
    with closing(TorchEngine(adapter, "toy@0", capacity=8)) as engine:
        streams = _streams(engine, adapter)
        late = []
        for number in range(10, 13):
            late.append(engine.submit(make_request(adapter, number)))
            late[-1].result(60)
        found = [handle.result(120) for handle in streams]
    assert failures
    assert [handle.suspicions for handle in (*streams, *late)] == [0] * 7
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


def test_time_is_counted_as_prefill_and_decode(adapter: Adapter) -> None:
    with closing(TorchEngine(adapter, "toy@0", capacity=8)) as engine:
        streams = _streams(engine, adapter)
        before = engine.stats()
        start = time.monotonic()
        for number in range(10, 20):
            engine.submit(make_request(adapter, number, max_new_tokens=1)).result(60)
        spent, after = time.monotonic() - start, engine.stats()
        prefill = after.prefill_seconds - before.prefill_seconds
        decode = after.decode_seconds - before.decode_seconds
        assert 0 < prefill and 0 < decode and prefill + decode < 1.05 * spent
        for handle in streams:
            handle.cancel()
