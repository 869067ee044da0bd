"""The torch engine: how answers begin, grow and end in its slots."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sharegpt4v.checkpoints.card import TOY_CAPTIONER
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.slots import bytes_per_slot, slots_that_fit
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene
from tests.engine.requests import PROMPTS, make_request, reference, watch_sampling


@pytest.fixture()
def engine(adapter: Adapter) -> Iterator[TorchEngine]:
    engine = TorchEngine(adapter, "toy@0", capacity=8)
    yield engine
    engine.close()


def test_batches_of_mixed_prompts_and_lengths_equal_generate(adapter: Adapter, engine: TorchEngine) -> None:
    requests = [
        make_request(adapter, seed, PROMPTS[seed % 2], max_new_tokens=(3, 12, 7)[seed % 3])
        for seed in range(20)
    ]
    answers = [handle.result(60) for handle in [engine.submit(request) for request in requests]]
    assert [(answer.text, answer.tokens) for answer in answers] == [
        reference(adapter, request) for request in requests
    ]
    assert len({answer.text for answer in answers}) > 1


def test_the_length_cap_is_kept_and_named(adapter: Adapter, engine: TorchEngine) -> None:
    answer = engine.submit(make_request(adapter, 1, max_new_tokens=3)).result(60)
    assert (answer.tokens, answer.finish_reason) == (3, "length")


def test_an_end_token_ends_the_answer_and_is_counted(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def end_the_fifth(seeds: dict[int, int], logits: torch.Tensor) -> None:
        steps.append(len(seeds))
        logits[:, min(adapter.eos_token_ids)] = 100.0 if len(steps) == 5 else -100.0

    watch_sampling(monkeypatch, end_the_fifth)
    with closing(TorchEngine(adapter, "toy@0", capacity=2)) as engine:
        answer = engine.submit(make_request(adapter, 1)).result(60)
    assert (answer.tokens, answer.finish_reason) == (5, "stop")


def test_one_unusable_request_fails_alone(adapter: Adapter, engine: TorchEngine) -> None:
    good = [make_request(adapter, seed) for seed in range(3)]
    small = (np.zeros((5, 5, 3), np.uint8),)
    bad = replace(make_request(adapter, 9), turns=(Turn("user", PROMPTS[0], small),))
    swapped = replace(make_request(adapter, 8), turns=(Turn("assistant", "Hello."),))
    handles = [engine.submit(request) for request in (good[0], bad, good[1], swapped, good[2])]
    with pytest.raises(EngineError):
        handles[1].result(60)
    with pytest.raises(EngineError, match="begins and ends with the user"):
        handles[3].result(60)
    for handle, request in zip((handles[0], handles[2], handles[4]), good, strict=True):
        assert handle.result(60).text == reference(adapter, request)[0]
    assert engine.stats().failed == 2


def test_a_sampled_answer_depends_on_the_seed_alone(adapter: Adapter, engine: TorchEngine) -> None:
    def text(seed: int | None, *company: Request) -> str:
        for other in company:
            engine.submit(other)
        return engine.submit(make_request(adapter, 1, temperature=1.5, seed=seed)).result(60).text

    alone = text(11)
    assert text(11, *[make_request(adapter, seed, temperature=2.0) for seed in range(2, 6)]) == alone
    assert len({alone, text(12), text(13)}) > 1
    assert text(None) == text(None) != alone  # drawn from the request's id


def test_a_cancelled_request_ends_and_its_neighbours_do_not(adapter: Adapter, engine: TorchEngine) -> None:
    handles = [engine.submit(make_request(adapter, seed, max_new_tokens=40)) for seed in range(3)]
    handles[1].cancel()
    assert handles[1].result(60).finish_reason == "cancelled"
    assert handles[0].result(60).finish_reason != "cancelled"


# Slots


def test_a_slot_is_refilled_while_others_go_on(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[set[int]] = []
    watch_sampling(monkeypatch, lambda seeds, logits: steps.append(set(seeds.values())))
    engine = TorchEngine(adapter, "toy@0", capacity=4)
    long = engine.submit(make_request(adapter, 0, max_new_tokens=120, min_new_tokens=120))
    short = [
        engine.submit(make_request(adapter, n, max_new_tokens=10, min_new_tokens=10)) for n in range(1, 16)
    ]
    assert [handle.result(60).tokens for handle in short] == [10] * 15
    assert long.result(60).tokens == 120
    engine.close()
    assert steps[-1] == {0}  # fifteen answers went through three slots meanwhile
    stats = engine.stats()
    assert stats.requests == 16 and stats.begun == 16 and stats.new_tokens == 120 + 150
    assert 0.5 < stats.slot_use <= 1 and stats.mean_ttft > 0 and stats.decode_rate > 0
    assert (stats.running, stats.queued) == (0, 0)


def test_the_slot_count_follows_memory() -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=8
    )
    one = bytes_per_slot(config, 100, torch.bfloat16)
    assert one == 2 * 3 * 2 * 16 * 100 * 2
    assert slots_that_fit(32, one, 10 * one) == 9
    assert slots_that_fit(4, one, 10 * one) == 4
    with pytest.raises(UserError, match=r"needs 2.00 GB .* 1.00 GB are free"):
        slots_that_fit(4, 2_000_000_000, 1_000_000_000)


# Text


@pytest.fixture(scope="module")
def speaking() -> Iterator[TorchEngine]:
    """The shipped captioner, whose answers are words."""
    engine = TorchEngine(load_adapter(TOY_CAPTIONER), "toy@0", capacity=8)
    yield engine
    engine.close()


def _scene(engine: TorchEngine, **sampling: Any) -> Request:
    size = engine.image_size
    image = np.array(render(make_scene(5, 2, source="coco", difficulty=1), (size, size)))
    return Request("scene", (Turn("user", PROMPTS[0], (image,)),), SamplingParams(**sampling))


def test_pieces_come_while_the_answer_grows_and_join_to_it(speaking: TorchEngine) -> None:
    handle = speaking.submit(replace(_scene(speaking), stream=True))
    pieces = list(handle)
    whole = speaking.submit(_scene(speaking))
    assert "".join(pieces) == handle.result(60).text == whole.result(60).text
    assert len(pieces) > 5 and list(whole) == [whole.result(60).text]


def test_a_stop_string_ends_the_answer_before_itself(speaking: TorchEngine) -> None:
    whole = speaking.submit(_scene(speaking)).result(60)
    stop = whole.text[20:27]
    handle = speaking.submit(replace(_scene(speaking, stop=("never there", stop)), stream=True))
    answer = handle.result(60)
    assert answer.text == whole.text[: whole.text.index(stop)].rstrip() == "".join(handle)
    assert answer.finish_reason == "stop" and answer.tokens < whole.tokens


def test_what_may_be_a_stop_string_is_held_back_and_shown_when_it_is_none(speaking: TorchEngine) -> None:
    whole = speaking.submit(_scene(speaking)).result(60).text
    handle = speaking.submit(replace(_scene(speaking, stop=(whole[20:24] + "#",)), stream=True))
    assert "".join(handle) == whole


def test_only_the_engine_computes_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second team of OpenMP threads, from loading, would nearly halve its speed."""
    threads: set[int] = set()
    watch_sampling(monkeypatch, lambda seeds, logits: threads.add(torch.get_num_threads()))
    torch.set_num_threads(3)
    engine = build_engine(EngineSpec("torch", "toy@0", str(TOY_CAPTIONER), capacity=2, threads=2))
    try:
        image = np.zeros((48, 48, 3), np.uint8)
        request = Request("r0", (Turn("user", PROMPTS[0], (image,)),), SamplingParams(max_new_tokens=3))
        assert engine.submit(request).result(60).tokens
        assert threads == {2}
        assert torch.get_num_threads() == 1
    finally:
        engine.close()
        torch.set_num_threads(1)


def test_an_engine_without_a_thread_is_refused(adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        TorchEngine(adapter, "toy@0", capacity=2, threads=0)


def test_slots_are_stored_as_kernels_read_them(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1, max_context=61)
    engine.close()
    assert engine._decoder.cache.keys[0].shape[2] == 64
