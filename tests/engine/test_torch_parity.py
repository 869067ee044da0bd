"""The torch engine gives token for token what transformers' own generate gives, whatever shares its slots."""

import random
from pathlib import Path

import pytest
import torch

from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.linear import join, pack
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from tests.engine.requests import (
    PROMPTS,
    SteppingDecoder,
    generate,
    is_a_tie,
    make_image,
    make_request,
    torch_answers,
)
from tests.models.random_weights import save_random_lmm


@pytest.mark.parametrize(("slots", "order"), [(32, "given"), (5, "reversed"), (13, "shuffled")])
def test_two_hundred_requests_of_mixed_lengths_equal_generate(
    adapter: Adapter, references: dict[str, list[int]], slots: int, order: str
) -> None:
    _assert_equal_but_for_ties(adapter, references, slots, order)


def test_steps_of_rounded_sizes_equal_generate(
    adapter: Adapter, references: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharegpt4v.engine.torch_engine.Decoder", SteppingDecoder)
    _assert_equal_but_for_ties(adapter, references, 13, "shuffled")


def test_packed_matrices_equal_generate(
    adapter: Adapter, references: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharegpt4v.engine.linear.LEAST_PACKED", 0)
    layer = join(torch.nn.Linear(8, 16))
    pack([layer])
    if layer.packed is None:
        pytest.skip("this torch packs no matrices here")
    _assert_equal_but_for_ties(adapter, references, 13, "shuffled")


def _assert_equal_but_for_ties(
    adapter: Adapter, references: dict[str, list[int]], slots: int, order: str
) -> None:
    requests = _mixed(adapter)
    if order != "given":
        requests = requests[::-1] if order == "reversed" else random.Random(3).sample(requests, len(requests))
    answers = torch_answers(adapter, requests, slots)
    apart = [request for request in requests if answers[request.id] != references[request.id]]
    ties = [
        request
        for request in apart
        if is_a_tie(adapter, request, answers[request.id], references[request.id])
    ]
    assert apart == ties, f"{len(apart) - len(ties)} answers differ, {len(ties)} ties"
    assert len(ties) <= 2  # measured: none


def _mixed(adapter: Adapter) -> list[Request]:
    draw = random.Random(1)
    return [
        make_request(
            adapter, number, PROMPTS[number % 2] * draw.choice((1, 1, 3)), max_new_tokens=draw.randint(1, 60)
        )
        for number in range(200)
    ]


@pytest.fixture(scope="module")
def references(adapter: Adapter) -> dict[str, list[int]]:
    return {request.id: generate(adapter, request) for request in _mixed(adapter)}


def test_text_only_and_rounds_with_images_of_their_own(tmp_path: Path) -> None:
    lmm = load_adapter(save_random_lmm(tmp_path))
    first, second, third = (make_image(lmm, number) for number in range(3))
    turns = (
        Turn("user", "What are these?", (first, second)),
        Turn("assistant", "Cats."),
        Turn("user", "And that?", (third,)),
    )
    requests = [
        Request("text", (Turn("user", "Hello"),), SamplingParams(max_new_tokens=9)),
        Request("rounds", turns, SamplingParams(max_new_tokens=9)),
    ]
    assert torch_answers(lmm, requests, 4) == {request.id: generate(lmm, request) for request in requests}
