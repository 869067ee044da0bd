"""A failed step costs little: its requests go on from the tokens they have, and others go on meanwhile."""

import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from tests.engine.requests import make_request, reference, spelling_numbers, tokens_of, watch_sampling


class FailsLate:
    """Raises whenever request 2 chooses its n-th token or a later one."""

    def __init__(self, token: int, noise: float = 0.0) -> None:
        self.token, self.noise = token, noise
        self.steps: dict[int, int] = {}
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, seeds: dict[int, int], logits: torch.Tensor) -> None:
        if self.noise:
            logits += self.noise * torch.randn(logits.shape, generator=self.random)
        for seed in seeds.values():
            self.steps[seed] = self.steps.get(seed, 0) + 1
        if 2 in seeds.values() and self.steps[2] >= self.token:
            raise RuntimeError("shape mismatch")


def test_a_late_error_costs_a_few_steps(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    watch_sampling(monkeypatch, FailsLate(140))
    requests = [make_request(adapter, n, max_new_tokens=150, min_new_tokens=150) for n in range(32)]
    with closing(TorchEngine(spelling_numbers(adapter), "toy@0", capacity=32)) as engine:
        handles = [engine.submit(request) for request in requests]
        with pytest.raises(EngineError, match="shape mismatch"):
            handles[2].result(120)
        answers = [handle.result(120) for handle in handles if handle is not handles[2]]
        assert engine.stats().slot_steps // 32 <= 149 + 20
    monkeypatch.undo()
    with closing(TorchEngine(spelling_numbers(adapter), "toy@0", capacity=32)) as engine:
        undisturbed = [engine.submit(request) for request in requests if request is not requests[2]]
        assert [tokens_of(answer) for answer in answers] == [tokens_of(h.result(120)) for h in undisturbed]


def test_innocent_streams_go_on_where_rounding_differs(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generated again under noise they would not repeat what was streamed."""
    watch_sampling(monkeypatch, FailsLate(10, noise=0.06))
    requests = [
        replace(make_request(adapter, n, max_new_tokens=20, min_new_tokens=20), stream=True) for n in range(8)
    ]
    with closing(TorchEngine(adapter, "toy@0", capacity=8)) as engine:
        handles = [engine.submit(request) for request in requests]
        for handle in handles:
            if handle is not handles[2]:
                assert handle.result(60).tokens == 20
                assert "".join(handle) == handle.result().text


def test_an_interrupted_sample_draws_the_same_numbers(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling: dict[str, Any] = {
        "max_new_tokens": 24,
        "min_new_tokens": 24,
        "temperature": 1.5,
        "repetition_penalty": 1.3,
    }
    requests = [make_request(adapter, n, **sampling) for n in range(6)]
    spelling = spelling_numbers(adapter)
    with closing(TorchEngine(spelling, "toy@0", capacity=8)) as engine:
        expected = [tokens_of(engine.submit(request).result(60)) for request in requests]
    watch_sampling(monkeypatch, FailsLate(9))
    with closing(TorchEngine(spelling, "toy@0", capacity=8)) as engine:
        handles = [engine.submit(request) for request in requests]
        for number, handle in enumerate(handles):
            if number != 2:
                assert tokens_of(handle.result(60)) == expected[number]


def test_others_begin_and_go_on_while_suspects_are_tried(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_sampling(monkeypatch, FailsLate(1))
    with closing(TorchEngine(adapter, "toy@0", capacity=4, prefill_tokens=64)) as engine:
        long = engine.submit(make_request(adapter, 0, max_new_tokens=400, min_new_tokens=400))
        while not engine.stats().new_tokens:
            time.sleep(0.001)
        bad = engine.submit(make_request(adapter, 2))
        after = engine.submit(make_request(adapter, 3))
        with pytest.raises(EngineError, match="shape mismatch"):
            bad.result(60)
        assert (after.result(60).text, after.result(60).tokens) == reference(adapter, after.request)
        assert not long.done()
        long.cancel()
