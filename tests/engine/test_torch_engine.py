"""The torch engine against transformers' own generate, on toy models with random weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from sharegpt4v.engine.base import EngineError, Image, Request, SamplingParams, Turn
from sharegpt4v.engine.sampling import pick_tokens
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter, load_adapter
from sharegpt4v.weights import locate, read_card
from tests.models.random_weights import save_random_captioner

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


def _reference(adapter: Adapter, request: Request) -> tuple[str, int]:
    """transformers' greedy generate, one request at a time."""
    embeddings = adapter.prompt_embeddings(request.images[0][None], request.turns[0].text)
    model: Any = adapter.language_model  # the declared self type of generate is a protocol of its own
    tokens = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(adapter.eos_token_ids),
        repetition_penalty=1.0,
    )[0].tolist()
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
        def _next_tokens(self, logits, rows):  # type: ignore[no-untyped-def]
            logits[:, min(adapter.eos_token_ids)] = 100.0 if len(rows[0].tokens) == 4 else -100.0
            return super()._next_tokens(logits, rows)

    engine = Ending(adapter, "toy@0", capacity=2)
    answer = engine.submit(_request(adapter, 1)).result(60)
    engine.close()
    assert (answer.tokens, answer.finish_reason) == (5, "stop")


def test_one_unusable_request_fails_alone(adapter: Adapter, engine: TorchEngine) -> None:
    good = [_request(adapter, seed) for seed in range(3)]
    bad = replace(_request(adapter, 9), images=(np.zeros((5, 5, 3), np.uint8),))
    many = replace(_request(adapter, 8), images=(_image(adapter, 1), _image(adapter, 2)))
    handles = [engine.submit(request) for request in (good[0], bad, good[1], many, good[2])]
    with pytest.raises(EngineError):
        handles[1].result(60)
    with pytest.raises(EngineError, match="2 images"):
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


def test_the_repetition_penalty_sees_generated_tokens_only() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    params = [SamplingParams(repetition_penalty=1.5)]
    none = [torch.Generator()]
    assert pick_tokens(logits.clone(), params, [[]], none).tolist() == [0]
    assert pick_tokens(logits.clone(), params, [[0]], none).tolist() == [1]
    negative = torch.tensor([[-2.0, -2.5, -9.0]])
    assert pick_tokens(negative, params, [[0]], none).tolist() == [1]


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    draws = {
        "top_k": SamplingParams(temperature=5.0, top_k=2),
        "top_p": SamplingParams(temperature=1.0, top_p=0.7),
    }
    for name, params in draws.items():
        seen = {
            int(pick_tokens(logits.clone(), [params], [[]], [torch.Generator().manual_seed(s)]))
            for s in range(200)
        }
        assert seen == {0, 1}, name


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        pick_tokens(torch.tensor([[1.0, float("nan")]]), [SamplingParams()], [[]], [torch.Generator()])


def test_weights_of_a_uri_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random_captioner(tmp_path / "model")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/models/captioner/", recursive=True)
    monkeypatch.setenv("SHAREGPT4V_CACHE", str(tmp_path / "cache"))
    card = read_card("memory://models/captioner")
    assert card.name == "captioner" and card.digest == read_card(str(folder)).digest
    memory.rm("/models/captioner", recursive=True)
    assert load_adapter(locate("memory://models/captioner")).image_size == card.image_size
