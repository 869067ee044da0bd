"""What was computed for an earlier round or the same image is not computed again, and changes nothing."""

from collections.abc import Iterator
from contextlib import closing
from unittest.mock import Mock

import pytest

from sharegpt4v.dialogue import Image, Request, SamplingParams, Turn
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from tests.engine.requests import make_image, spelling_numbers, tokens_of
from tests.models.random_weights import save_random_lmm


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return load_adapter(save_random_lmm(tmp_path_factory.mktemp("lmm")))


@pytest.fixture()
def engine(lmm: Adapter) -> Iterator[TorchEngine]:
    with closing(TorchEngine(lmm, "toy@0", capacity=4, prefixes=3)) as engine:
        yield engine


def _ask(*turns: Turn, tokens: int = 8) -> Request:
    return Request("r", turns, SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens))


def test_a_second_round_prefills_only_what_is_new(lmm: Adapter, engine: TorchEngine) -> None:
    first = Turn("user", "What is in this picture?", (make_image(lmm, 1),))
    answer = engine.submit(_ask(first)).result(60)
    before = engine.stats().prompt_tokens
    second = _ask(first, Turn("assistant", answer.text), Turn("user", "And where?"))
    again = engine.submit(second).result(60)
    # All but the last token of the answer, which no step has fed, and what text and tokens disagree on.
    assert again.cached_tokens >= answer.prompt_tokens
    assert again.prompt_tokens == engine.count(second.turns)
    assert engine.stats().prompt_tokens - before == again.prompt_tokens - again.cached_tokens < 30
    with closing(TorchEngine(lmm, "toy@0", capacity=4)) as uncached:
        expected = uncached.submit(second).result(60)
    assert (again.token_ids, expected.cached_tokens) == (expected.token_ids, 0)


def test_the_vision_tower_does_not_see_a_known_image_again(
    lmm: Adapter, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Mock(wraps=lmm.image_features)
    monkeypatch.setattr(lmm, "image_features", features)
    known, fresh = make_image(lmm, 1), make_image(lmm, 2)
    engine.submit(_ask(Turn("user", "What is it?", (known,)))).result(60)
    other = _ask(Turn("user", "Which colour has it?", (known.copy(),)))
    assert engine.submit(other).result(60).cached_tokens > lmm.template.image_tokens
    assert features.call_count == 1
    two = _ask(Turn("user", "Which colour has it?", (known, fresh)))
    assert engine.submit(two).result(60).cached_tokens > lmm.template.image_tokens
    assert [len(call.args[0]) for call in features.call_args_list] == [1, 1]


def test_equal_images_of_a_batch_are_embedded_once(lmm: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Mock(wraps=lmm.image_features)
    monkeypatch.setattr(lmm, "image_features", features)
    one, other = make_image(lmm, 1), make_image(lmm, 2)
    requests = [_ask(Turn("user", "What?", images)) for images in ((one,), (other, one.copy()), ())]
    prompts = lmm.embed(requests)
    assert [len(call.args[0]) for call in features.call_args_list] == [2]
    for request, prompt in zip(requests, prompts, strict=True):
        [alone] = lmm.embed([request])
        assert prompt.shape == alone.shape and (prompt - alone).abs().max() < 1e-5


@pytest.mark.parametrize("skip", [0, 1, 5, 40, 70, 100, 120])
def test_an_embedding_behind_any_place_is_the_rest_of_the_whole(lmm: Adapter, skip: int) -> None:
    images: tuple[Image, ...] = (make_image(lmm, 1), make_image(lmm, 2))
    request = _ask(Turn("user", "What are these two?", images))
    [whole] = lmm.embed([request])
    [rest] = lmm.embed([request], [skip])
    assert len(whole) > skip and len(rest) == len(whole) - skip
    assert (rest - whole[skip:]).abs().max() < 1e-5


def test_dialogues_that_share_some_tokens_answer_as_without(lmm: Adapter) -> None:
    texts = ("What is in this picture?", "What is in this house?", "Who?", "What is in this picture?")
    requests = [
        _ask(Turn("user", text, (make_image(lmm, image),) if image else ()), tokens=6)
        for image in (1, 2, 0)
        for text in texts
    ]
    with closing(TorchEngine(spelling_numbers(lmm), "toy@0", capacity=2, prefixes=2)) as engine:
        answers = [engine.submit(request).result(60) for request in requests]
    with closing(TorchEngine(spelling_numbers(lmm), "toy@0", capacity=1)) as engine:
        expected = [engine.submit(request).result(60) for request in requests]
    assert [tokens_of(answer) for answer in answers] == [tokens_of(answer) for answer in expected]
    assert sum(answer.cached_tokens > 0 for answer in answers) > len(requests) // 2


def test_only_so_many_dialogues_are_kept(lmm: Adapter, engine: TorchEngine) -> None:
    requests = [_ask(Turn("user", "What is it?", (make_image(lmm, n),))) for n in range(5)]
    for request in requests:
        engine.submit(request).result(60)
    cached = [engine.submit(request).result(60).cached_tokens for request in (requests[0], requests[4])]
    assert cached[0] < lmm.template.image_tokens < cached[1]
