"""The torch engine against transformers' own generate, on toy models with random weights."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sharegpt4v.engine.base import EngineClosed, EngineError, Image, Request, SamplingParams, Turn
from sharegpt4v.engine.slots import bytes_per_slot, slots_that_fit
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter, load_adapter
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.weights import TOY_CAPTIONER, locate, read_card
from tests.models.random_weights import save_random_captioner, save_random_lmm

PROMPTS = ("Analyze the image in a comprehensive and detailed manner.", "Analyze the image.")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    torch.set_num_threads(1)
    return load_adapter(save_random_captioner(tmp_path_factory.mktemp("captioner")))


@pytest.fixture()
def engine(adapter: Adapter) -> Iterator[TorchEngine]:
    engine = TorchEngine(adapter, "toy@0", capacity=8)
    yield engine
    engine.close()


def _image(adapter: Adapter, seed: int) -> Image:
    size = adapter.image_size
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _request(adapter: Adapter, number: int, prompt: str = PROMPTS[0], **sampling: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 12} | sampling)
    return Request(f"r{number}", (Turn("user", prompt),), (_image(adapter, number),), params)


def _generate(adapter: Adapter, request: Request) -> list[int]:
    """transformers' greedy generate, one request at a time."""
    embeddings = torch.stack(adapter.embed([request]))
    model: Any = adapter.language_model  # the declared self type of generate is a protocol of its own
    tokens: list[int] = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(adapter.eos_token_ids),
        repetition_penalty=1.0,
    )[0].tolist()
    return tokens


def _reference(adapter: Adapter, request: Request) -> tuple[str, int]:
    tokens = _generate(adapter, request)
    kept = [token for token in tokens if token not in adapter.eos_token_ids]
    return str(adapter.tokenizer.decode(kept, skip_special_tokens=True)).strip(), len(tokens)


def test_batches_of_mixed_prompts_and_lengths_equal_generate(adapter: Adapter, engine: TorchEngine) -> None:
    requests = [
        _request(adapter, seed, PROMPTS[seed % 2], max_new_tokens=(3, 12, 7)[seed % 3]) for seed in range(20)
    ]
    answers = [handle.result(60) for handle in [engine.submit(request) for request in requests]]
    assert [(answer.text, answer.tokens) for answer in answers] == [
        _reference(adapter, request) for request in requests
    ]
    assert len({answer.text for answer in answers}) > 1


def test_the_length_cap_is_kept_and_named(adapter: Adapter, engine: TorchEngine) -> None:
    answer = engine.submit(_request(adapter, 1, max_new_tokens=3)).result(60)
    assert (answer.tokens, answer.finish_reason) == (3, "length")


def test_an_end_token_ends_the_answer_and_is_counted(adapter: Adapter) -> None:
    class Ending(TorchEngine):
        def _take_tokens(self, logits: torch.Tensor, slots: Any) -> None:
            row = self._rows[slots[0]]
            logits[:, min(adapter.eos_token_ids)] = 100.0 if row and len(row.tokens) == 4 else -100.0
            super()._take_tokens(logits, slots)

    engine = Ending(adapter, "toy@0", capacity=2)
    answer = engine.submit(_request(adapter, 1)).result(60)
    engine.close()
    assert (answer.tokens, answer.finish_reason) == (5, "stop")


def test_one_unusable_request_fails_alone(adapter: Adapter, engine: TorchEngine) -> None:
    good = [_request(adapter, seed) for seed in range(3)]
    bad = replace(_request(adapter, 9), images=(np.zeros((5, 5, 3), np.uint8),))
    swapped = replace(_request(adapter, 8), turns=(Turn("assistant", "Hello."),))
    handles = [engine.submit(request) for request in (good[0], bad, good[1], swapped, good[2])]
    with pytest.raises(EngineError):
        handles[1].result(60)
    with pytest.raises(EngineError, match="begins and ends with the user"):
        handles[3].result(60)
    for handle, request in zip((handles[0], handles[2], handles[4]), good, strict=True):
        assert handle.result(60).text == _reference(adapter, request)[0]
    assert engine.stats().failed == 2


def test_a_sampled_answer_depends_on_the_seed_alone(adapter: Adapter, engine: TorchEngine) -> None:
    def text(seed: int, *company: Request) -> str:
        for other in company:
            engine.submit(other)
        return engine.submit(_request(adapter, 1, temperature=1.5, seed=seed)).result(60).text

    alone = text(11)
    assert text(11, *[_request(adapter, seed, temperature=2.0) for seed in range(2, 6)]) == alone
    assert len({alone, text(12), text(13)}) > 1


def test_a_cancelled_request_ends_and_its_neighbours_do_not(adapter: Adapter, engine: TorchEngine) -> None:
    handles = [engine.submit(_request(adapter, seed, max_new_tokens=40)) for seed in range(3)]
    handles[1].cancel()
    assert handles[1].result(60).finish_reason == "cancelled"
    assert handles[0].result(60).finish_reason != "cancelled"


# Parity


def _logits_of(adapter: Adapter, prompt: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """What follows the prompt and `tokens`: (V,)."""
    table = adapter.language_model.get_input_embeddings()
    with torch.inference_mode():
        whole = torch.cat([prompt, table(torch.tensor(tokens, dtype=torch.long))])
        logits: torch.Tensor = adapter.language_model(inputs_embeds=whole[None], logits_to_keep=1).logits
    return logits[0, -1]


def _is_a_tie(adapter: Adapter, request: Request, ours: list[int], reference: list[int]) -> bool:
    """Whether the two part where the reference's two best logits are within 1e-4."""
    same = next(i for i, (a, b) in enumerate(zip(ours, reference, strict=False)) if a != b)
    [prompt] = adapter.embed([request])
    best = _logits_of(adapter, prompt, reference[:same]).topk(2).values
    return bool(best[0] - best[1] < 1e-4)


class _Tokens(TorchEngine):
    """Keeps the tokens of every answer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.answers: dict[str, list[int]] = {}
        super().__init__(*args, **options)

    def _settle(self, row: Any) -> bool:
        self.answers[row.handle.request.id] = row.tokens
        return super()._settle(row)


@pytest.mark.parametrize(("slots", "order"), [(32, "given"), (5, "reversed"), (13, "shuffled")])
def test_two_hundred_requests_of_mixed_lengths_equal_generate(
    adapter: Adapter, references: dict[str, list[int]], slots: int, order: str
) -> None:
    requests = _mixed(adapter)
    if order != "given":
        requests = requests[::-1] if order == "reversed" else random.Random(3).sample(requests, len(requests))
    engine = _Tokens(adapter, "toy@0", capacity=slots)
    for handle in [engine.submit(request) for request in requests]:
        handle.result(120)
    engine.close()
    apart = [request for request in requests if engine.answers[request.id] != references[request.id]]
    ties = [
        request
        for request in apart
        if _is_a_tie(adapter, request, engine.answers[request.id], references[request.id])
    ]
    assert apart == ties, f"{len(apart) - len(ties)} answers differ, {len(ties)} ties"
    assert len(ties) <= 2  # measured: none


def _mixed(adapter: Adapter) -> list[Request]:
    draw = random.Random(1)
    return [
        _request(
            adapter, number, PROMPTS[number % 2] * draw.choice((1, 1, 3)), max_new_tokens=draw.randint(1, 60)
        )
        for number in range(200)
    ]


@pytest.fixture(scope="module")
def references(adapter: Adapter) -> dict[str, list[int]]:
    return {request.id: _generate(adapter, request) for request in _mixed(adapter)}


def test_text_only_and_several_rounds_with_two_images(tmp_path: Path) -> None:
    lmm = load_adapter(save_random_lmm(tmp_path))
    turns = (Turn("user", "What is this?"), Turn("assistant", "A cat."), Turn("user", "And that?"))
    requests = [
        Request("text", (Turn("user", "Hello"),), (), SamplingParams(max_new_tokens=9)),
        Request("two", turns, (_image(lmm, 1), _image(lmm, 2)), SamplingParams(max_new_tokens=9)),
    ]
    engine = _Tokens(lmm, "lmm@0", capacity=4)
    for handle in [engine.submit(request) for request in requests]:
        handle.result(60)
    engine.close()
    assert engine.answers == {request.id: _generate(lmm, request) for request in requests}


# Slots


def test_a_slot_is_refilled_while_others_go_on(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=4)
    long = engine.submit(_request(adapter, 0, max_new_tokens=120, min_new_tokens=120))
    short = [engine.submit(_request(adapter, n, max_new_tokens=10, min_new_tokens=10)) for n in range(1, 16)]
    for handle in short:
        handle.result(60)
    assert not long.done()  # fifteen answers went through three slots meanwhile
    assert long.result(60).tokens == 120
    stats = engine.stats()
    engine.close()
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
    return Request("scene", (Turn("user", PROMPTS[0]),), (image,), SamplingParams(**sampling))


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


# What goes wrong


def test_a_prompt_longer_than_the_context_is_named_with_both_numbers(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=2, max_context=64)
    long, short = _request(adapter, 1, "describe " * 80), _request(adapter, 2, "Hi", max_new_tokens=500)
    first, second = engine.submit(long), engine.submit(short)
    [prompt, other] = adapter.embed([long, short])
    with pytest.raises(EngineError, match=f"{len(prompt)} tokens and the context 64"):
        first.result(60)
    answer = second.result(60)  # ends where the context does
    engine.close()
    assert (answer.tokens, answer.finish_reason) == (
        64 - len(other),
        "length",
    ) or answer.finish_reason == "stop"


def test_a_request_may_be_cancelled_at_any_time(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1)
    running = engine.submit(_request(adapter, 1, max_new_tokens=400, min_new_tokens=400))
    waiting = engine.submit(_request(adapter, 2))
    waiting.cancel()
    assert waiting.result(5).finish_reason == "cancelled"  # while the only slot is taken
    assert not running.done()
    running.cancel()
    answer = running.result(5)
    assert answer.finish_reason == "cancelled" and answer.tokens < 400
    running.cancel()  # afterwards it does nothing
    assert engine.submit(_request(adapter, 3)).result(60).tokens > 0
    engine.close()


def test_a_request_whose_time_is_over_fails_and_frees_its_slot(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1)
    endless = _request(adapter, 1, max_new_tokens=900, min_new_tokens=900)
    with pytest.raises(EngineError, match=r"within its 0.2 s, after \d+ tokens"):
        engine.submit(replace(endless, timeout=0.2)).result(60)
    assert engine.submit(_request(adapter, 3)).result(60).tokens > 0
    engine.close()


class _Faulty(TorchEngine):
    """`fault(rows, logits)` is called before tokens are chosen."""

    fault: Any = None

    def _take_tokens(self, logits: torch.Tensor, slots: Any) -> None:
        if self.fault:
            self.fault({slot: self._rows[slot].handle.request.id for slot in slots}, logits)
        super()._take_tokens(logits, slots)


def test_logits_that_are_no_numbers_fail_their_request_alone(adapter: Adapter) -> None:
    def poison(ids: dict[int, str], logits: torch.Tensor) -> None:
        for row, key in enumerate(ids.values()):
            if key == "r2":
                logits[row] = torch.nan

    engine = _Faulty(adapter, "toy@0", capacity=8)
    engine.fault = poison
    handles = [engine.submit(_request(adapter, number)) for number in range(5)]
    with pytest.raises(EngineError, match="not numbers after 0 tokens"):
        handles[2].result(60)
    assert [handle.result(60).tokens > 0 for handle in handles if handle is not handles[2]] == [True] * 4
    engine.close()


def test_a_slot_that_held_no_numbers_serves_the_next_request(adapter: Adapter) -> None:
    requests = [
        _request(adapter, 1, PROMPTS[0] * 3, max_new_tokens=30, min_new_tokens=30),
        _request(adapter, 2, max_new_tokens=60),  # longer: what comes next attends as far as this one stands
        _request(adapter, 3, max_new_tokens=5),
    ]
    engine = _Faulty(adapter, "toy@0", capacity=2)
    engine._decoder.cache.better_apart = lambda lengths: False  # type: ignore[method-assign]

    def poison(ids: dict[int, str], logits: torch.Tensor) -> None:
        for row, (slot, key) in enumerate(ids.items()):
            if key == "r1":
                for tensor in (*engine._decoder.cache.keys, *engine._decoder.cache.values):
                    tensor[slot] = torch.nan
                logits[row] = torch.nan

    engine.fault = poison
    handles = [engine.submit(request) for request in requests]
    with pytest.raises(EngineError, match="not numbers"):
        handles[0].result(60)
    for request, handle in zip(requests[1:], handles[1:], strict=True):
        assert (handle.result(60).text, handle.result(60).tokens) == _reference(adapter, request)
    engine.close()


def test_a_failing_step_costs_only_the_request_at_fault(adapter: Adapter) -> None:
    def fail(ids: dict[int, str], logits: torch.Tensor) -> None:
        if "r2" in ids.values():
            raise RuntimeError("shape mismatch")

    engine = _Faulty(adapter, "toy@0", capacity=4)
    engine.fault = fail
    requests = [_request(adapter, number) for number in range(9)]
    handles = [engine.submit(request) for request in requests]
    with pytest.raises(EngineError, match="RuntimeError: shape mismatch"):
        handles[2].result(60)
    for request, handle in zip(requests, handles, strict=True):
        if request.id != "r2":
            assert (handle.result(60).text, handle.result(60).tokens) == _reference(adapter, request)
    assert engine.stats().failed == 1
    engine.close()


def test_out_of_memory_halves_the_slots_once_and_loses_nothing(
    adapter: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    def tight(ids: dict[int, str], logits: torch.Tensor) -> None:
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = _Faulty(adapter, "toy@0", capacity=8)
    engine.fault = tight
    requests = [replace(_request(adapter, number), stream=True) for number in range(12)]
    handles = [engine.submit(request) for request in requests]
    for request, handle in zip(requests, handles, strict=True):
        assert (handle.result(60).text, handle.result(60).tokens) == _reference(adapter, request)
        assert "".join(handle) == handle.result().text
    assert engine.stats().slots == engine.capacity == 4
    assert "goes on with 4" in caplog.text
    engine.close()


def test_out_of_memory_again_ends_the_engine_and_says_so(adapter: Adapter) -> None:
    def full(ids: dict[int, str], logits: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = _Faulty(adapter, "toy@0", capacity=8)
    engine.fault = full
    with pytest.raises(EngineError, match="out of memory with 4 slots"):
        engine.submit(_request(adapter, 1)).result(60)
    with pytest.raises(EngineClosed):
        engine.submit(_request(adapter, 2))


def test_closing_fails_what_runs_and_what_waits(adapter: Adapter) -> None:
    engine = TorchEngine(adapter, "toy@0", capacity=1)
    handles = [engine.submit(_request(adapter, n, max_new_tokens=900, min_new_tokens=900)) for n in range(3)]
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosed):
            handle.result(5)


def test_weights_of_a_uri_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random_captioner(tmp_path / "model")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/models/captioner/", recursive=True)
    monkeypatch.setenv("SHAREGPT4V_CACHE", str(tmp_path / "cache"))
    card = read_card("memory://models/captioner")
    assert card.name == "captioner" and card.digest == read_card(str(folder)).digest
    memory.rm("/models/captioner", recursive=True)
    assert load_adapter(locate("memory://models/captioner")).image_size == card.image_size
