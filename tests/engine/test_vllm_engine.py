"""The vllm engine gives the torch engine's answers, and has its manners.

Runs only where vLLM is installed, there with
`PYTHONPATH=platform:. python -m pytest tests/engine -k vllm`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sharegpt4v.checkpoints.card import read_card
from sharegpt4v.dialogue import Image, Request, SamplingParams, Turn
from sharegpt4v.engine.handle import EngineClosed, EngineError
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.engine.vllm_engine import VllmEngine
from sharegpt4v.engine.vllm_setup import load_frontend
from sharegpt4v.errors import UserError
from sharegpt4v.models.load import load_adapter
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.toy.shipped import SHIPPED
from tests.engine.requests import NumberTokenizer, is_a_tie, needs_vllm, tokens_of, torch_answers

PROMPT = UNIFIED_CAPTION.text
SIDE = 48
"""Of the images that both shipped models take."""


@pytest.fixture(scope="module", params=["captioner", "lmm"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """One of the shipped models; its answers are words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHAREGPT4V_CACHE", str(tmp_path_factory.mktemp("cache")))
        card = read_card(str(SHIPPED / request.param))
        frontend = load_frontend(card.folder, torch.float32, use_gpu=torch.cuda.is_available())
        engine = VllmEngine(frontend, card.id, capacity=8)
    yield engine
    engine.close()


def _scene(number: int, size: int) -> Image:
    return np.array(render(make_scene(number, 2, source="coco", difficulty=1 + number % 3), (size, size)))


def _request(engine: Any, number: int, prompt: str = PROMPT, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 200} | sampling)
    return Request(f"r{number}", (Turn("user", prompt, (_scene(number, SIDE),)),), params)


def _endless(engine: Any, number: int) -> Request:
    return _request(engine, number, max_new_tokens=900, min_new_tokens=900)


def _mixed(engine: Any) -> list[Request]:
    """Forty scenes, some with a long prompt, a penalty or a floor; dialogues with three images and none."""
    requests = [_request(engine, number) for number in range(40)]
    for number in range(0, 40, 4):
        requests[number] = _request(engine, number, PROMPT * (8 if number % 8 else 1), repetition_penalty=1.3)
        requests[number + 1] = _request(engine, number + 1, min_new_tokens=60, max_new_tokens=80)
    first, second, third = (_scene(number, SIDE) for number in (50, 51, 52))
    text = (Turn("user", PROMPT), Turn("assistant", "A red square."), Turn("user", "Analyze </s> it."))
    rounds = (replace(text[0], images=(first, second)), text[1], replace(text[2], images=(third,)))
    some = SamplingParams(max_new_tokens=60)
    return [*requests, Request("text", text, some), Request("rounds", rounds, some)]


@needs_vllm
def test_greedy_answers_are_the_torch_engines_token_for_token(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(engine.frontend.folder)
    requests = _mixed(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.frontend, "tokenizer", NumberTokenizer(engine.frontend.tokenizer))
        handles = [engine.submit(request) for request in requests]
        ours = {handle.request.id: tokens_of(handle.result(120)) for handle in handles}
    theirs = torch_answers(adapter, requests, 8)
    apart = [request for request in requests if ours[request.id] != theirs[request.id]]
    # The tie is looked for in bare logits: only requests that change none may have one.
    ties = [
        request
        for request in apart
        if request.sampling.repetition_penalty == 1
        and is_a_tie(adapter, request, ours[request.id], theirs[request.id])
    ]
    assert apart == ties, f"{len(apart) - len(ties)} answers differ, {len(ties)} ties"
    assert len(ties) <= 2  # measured: none
    assert len(set(map(tuple, ours.values()))) > 20


@needs_vllm
def test_a_sampled_answer_depends_on_the_seed_alone(engine: VllmEngine) -> None:
    def text(seed: int | None, *company: Request) -> str:
        for other in company:
            engine.submit(other)
        return engine.submit(_request(engine, 1, temperature=2.0, top_p=0.999, seed=seed)).result(60).text

    alone = text(11)
    assert text(11, *[_request(engine, seed, temperature=1.5) for seed in range(2, 6)]) == alone
    assert len({text(seed) for seed in range(12)}) > 3  # the toy models are sure of most words
    assert text(None) == text(None)
    assert text(2**70 + 11) != ""  # of any size, as the torch engine takes it


@needs_vllm
def test_the_likeliest_token_alone_is_the_greedy_one(engine: VllmEngine) -> None:
    greedy = engine.submit(_request(engine, 1)).result(60)
    assert engine.submit(_request(engine, 1, temperature=2.0, top_k=1)).result(60) == greedy
    assert engine.submit(_request(engine, 1, temperature=2.0, top_p=1e-6)).result(60) == greedy


@needs_vllm
def test_pieces_come_while_the_answer_grows_and_join_to_it(engine: VllmEngine) -> None:
    handle = engine.submit(replace(_request(engine, 5), stream=True))
    pieces = list(handle)
    whole = engine.submit(_request(engine, 5))
    assert "".join(pieces) == handle.result(60).text == whole.result(60).text
    assert len(pieces) > 5 and list(whole) == [whole.result(60).text]
    assert whole.result().finish_reason == "stop"


@needs_vllm
def test_a_stop_string_ends_the_answer_before_itself(engine: VllmEngine) -> None:
    whole = engine.submit(_request(engine, 5)).result(60)
    stop = whole.text[20:27]
    handle = engine.submit(replace(_request(engine, 5, stop=("never there", stop)), stream=True))
    answer = handle.result(60)
    assert answer.text == whole.text[: whole.text.index(stop)].rstrip() == "".join(handle)
    assert answer.finish_reason == "stop" and answer.tokens < whole.tokens


@needs_vllm
def test_the_length_cap_is_kept_and_named(engine: VllmEngine) -> None:
    answer = engine.submit(_request(engine, 1, max_new_tokens=3)).result(60)
    assert (answer.tokens, answer.finish_reason) == (3, "length")


@needs_vllm
def test_a_request_may_be_cancelled_at_any_time(engine: VllmEngine) -> None:
    running = [engine.submit(_endless(engine, number)) for number in range(engine.capacity)]
    waiting = engine.submit(_request(engine, 2))
    waiting.cancel()
    assert waiting.result(5).finish_reason == "cancelled"
    assert not any(handle.done() for handle in running)
    for handle in running:
        handle.cancel()
    for handle in running:
        answer = handle.result(5)
        assert answer.finish_reason == "cancelled" and answer.tokens < 900
    assert engine.submit(_request(engine, 3)).result(60).tokens > 0
    assert (engine.stats().running, engine.stats().queued) == (0, 0)
    assert not engine._core.has_unfinished_requests()  # nothing goes on unseen


@needs_vllm
def test_a_request_whose_time_is_over_fails_alone(engine: VllmEngine) -> None:
    before = engine.stats().failed
    late = engine.submit(replace(_endless(engine, 1), timeout=0.2))
    other = engine.submit(_request(engine, 3))
    with pytest.raises(EngineError, match=r"within its 0.2 s, after \d+ tokens"):
        late.result(60)
    assert other.result(60).tokens > 0 and engine.stats().failed == before + 1
    assert not engine._core.has_unfinished_requests()


@needs_vllm
def test_a_prompt_longer_than_the_context_is_named_with_both_numbers(engine: VllmEngine) -> None:
    long = _request(engine, 1, PROMPT * 120)
    tokens = engine.count(long.turns)
    with pytest.raises(EngineError, match=f"{tokens} tokens and the context 1024"):
        engine.submit(long).result(60)
    fitting = _request(engine, 1, PROMPT * 70, min_new_tokens=900, max_new_tokens=900)
    answer = engine.submit(fitting).result(60)  # ends where the context does
    assert answer.tokens == 1024 - engine.count(fitting.turns)
    assert answer.finish_reason == "length"


@needs_vllm
def test_one_unusable_request_fails_alone(engine: VllmEngine) -> None:
    good = [_request(engine, seed) for seed in range(3)]
    small = Request("small", (Turn("user", PROMPT, (np.zeros((5, 5, 3), np.uint8),)),))
    swapped = replace(_request(engine, 8), turns=(Turn("assistant", "Hello."),))
    scored = _request(engine, 7, logprobs=1)
    handles = [engine.submit(request) for request in (good[0], small, good[1], swapped, scored, good[2])]
    for number, reason in ((1, "uint8"), (3, "begins and ends with the user"), (4, "no log probabilities")):
        with pytest.raises(EngineError, match=reason):
            handles[number].result(60)
    assert all(handles[number].result(60).tokens > 0 for number in (0, 2, 5))


@needs_vllm
def test_a_failing_step_costs_only_the_request_at_fault(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [_request(engine, number) for number in range(9)]
    expected = [handle.result(60) for handle in [engine.submit(request) for request in requests]]

    executor = engine._core.model_executor
    execute = executor.execute_model

    def faulty(*args: Any, **options: Any) -> Any:
        if "r2" in [running.handle.request.id for running in engine._scheduler.running.values()]:
            raise RuntimeError("shape mismatch")
        return execute(*args, **options)

    monkeypatch.setattr(executor, "execute_model", faulty)
    handles = [engine.submit(request) for request in requests]
    with pytest.raises(EngineError, match="RuntimeError: shape mismatch"):
        handles[2].result(60)
    answers = [handle.result(60) for handle in handles if handle is not handles[2]]
    assert answers == [answer for number, answer in enumerate(expected) if number != 2]


@needs_vllm
def test_logits_that_are_no_numbers_fail_their_request_alone(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine._core.model_executor.driver_worker.worker.model_runner
    compute = runner.model.compute_logits

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        logits: torch.Tensor = compute(*args, **options)
        for row, key in enumerate(runner.input_batch.req_ids):
            running = engine._scheduler.running.get(engine._slots.get(key.split("-")[0], -1))
            if running and running.handle.request.id == "r2":
                logits[row] = torch.nan
        return logits

    requests = [_request(engine, number) for number in range(5)]
    expected = [engine.submit(request).result(120).text for request in requests]
    monkeypatch.setattr(runner.model, "compute_logits", poisoned)
    handles = [engine.submit(request) for request in requests]
    with pytest.raises(EngineError, match="(?i)nan.*logits"):
        handles[2].result(120)
    for number in (0, 1, 3, 4):
        assert handles[number].result(120).text == expected[number]


@needs_vllm
def test_a_vllm_for_the_other_device_is_refused() -> None:
    with pytest.raises(UserError, match="this vLLM is built for"):
        load_frontend(SHIPPED / "captioner", torch.float32, use_gpu=not torch.cuda.is_available())


@needs_vllm
def test_a_process_has_one_vllm_engine(engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="has a vllm engine already"):
        VllmEngine(engine.frontend, engine.model, capacity=1)


@needs_vllm
def test_statistics_add_up(engine: VllmEngine) -> None:
    def settled() -> EngineStats:
        # A step is counted after its answers are out; by the next turn, which refuses this, it is.
        with pytest.raises(EngineError, match="the context"):
            engine.submit(_request(engine, 1, PROMPT * 120)).result(60)
        return engine.stats()

    before = settled()
    answers = [engine.submit(_request(engine, number)) for number in range(12)]
    tokens = sum(handle.result(60).tokens for handle in answers)
    after = settled()
    # Also in steps where others begin; the first token of each belongs to its prefill.
    assert after.live_steps - before.live_steps == tokens - 12
    assert after.requests - before.requests == after.begun - before.begun == 12
    assert after.new_tokens - before.new_tokens == tokens
    assert (
        0 < after.slot_use <= 1 and after.decode_rate > 0 and after.prefill_rate > 0 and after.mean_ttft > 0
    )


@needs_vllm
def test_closing_fails_what_runs_and_what_waits(engine: VllmEngine) -> None:  # the last one of its engine
    handles = [engine.submit(_endless(engine, number)) for number in range(engine.capacity + 3)]
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosed):
            handle.result(5)
    with pytest.raises(EngineClosed):
        engine.submit(_request(engine, 1))
