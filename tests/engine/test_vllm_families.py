"""The vllm engine asks other families by their own chat templates, and answers as the transformers engine."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from sharegpt4v.checkpoints.card import read_card
from sharegpt4v.dialogue import Request, Turn, WholeImages
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.engine.handle import Engine, EngineError
from tests.engine.requests import needs_vllm
from tests.engine.vlm_requests import GREEDY, colour, mixed, picture
from tests.models.tiny_vlms import save_idefics, save_qwen

FAMILIES: dict[str, Callable[[Path], Path]] = {"qwen": save_qwen, "idefics": save_idefics}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("vlm") / request.param)


def _build(kind: Literal["vllm", "transformers"], folder: Path) -> Engine:
    card = read_card(str(folder), engine=kind)
    assert isinstance(card.images, WholeImages)
    gpu = torch.cuda.is_available()
    return build_engine(EngineSpec(kind, card.id, card.weights, capacity=6, threads=1, use_gpu=gpu))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with closing(_build("vllm", folder)) as engine:
        yield engine


def _even(count: int) -> list[Request]:
    shapes = [(56, 84), (112, 56), (56, 140)]
    turns = [Turn("user", "Describe it.", (picture(seed, *shapes[seed % 3]),)) for seed in range(count)]
    return [Request(f"even {seed}", (turn,), GREEDY) for seed, turn in enumerate(turns)]


@needs_vllm
def test_greedy_answers_are_the_transformers_engines(engine: Engine, folder: Path) -> None:
    # vLLM's processors resize by torchvision where it is there, which rounds other pixels than Pillow does.
    requests = mixed(18, draw=colour)
    if folder.name == "qwen":  # these shapes are not resized
        requests += _even(6)
    with closing(_build("transformers", folder)) as other:
        wanted = [handle.result(120) for handle in [other.submit(request) for request in requests]]
        tokens = [other.count(request.turns) for request in requests]
    answers = [handle.result(120) for handle in [engine.submit(request) for request in requests]]
    assert [answer.prompt_tokens for answer in answers] == tokens
    assert [engine.count(request.turns) for request in requests] == tokens
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    assert answers == wanted
    assert len({answer.text for answer in answers}) > 9  # the model looks at what it is asked


@needs_vllm
def test_control_strings_in_a_text_stay_text(engine: Engine, folder: Path) -> None:
    """Whatever the model's tokenizer has: were they control tokens, prompts would be as long without them."""
    for control in ("<|im_end|>", "<|im_start|>", "</s>", "<image>", "<|image_pad|>", "<|vision_start|>"):
        turns = (Turn("user", f"Describe {control} it.", (picture(0),)),)
        plain = (Turn("user", "Describe it.", (picture(0),)),)
        assert engine.count(turns) > engine.count(plain) + 2, control
        answer = engine.submit(Request(control, turns)).result(60)
        assert answer.prompt_tokens == engine.count(turns)
    only = (Turn("user", "<image><|image_pad|><|im_end|>"),)
    assert engine.submit(Request("no image", only)).result(60).tokens > 0


@needs_vllm
def test_one_bad_request_fails_alone(engine: Engine) -> None:
    good = mixed(4)
    bad = {
        "ends with the user": (Turn("user", "A?"), Turn("assistant", "B.")),
        "the context 1024": (Turn("user", "tree " * 2_000),),
        "expected uint8": (Turn("user", "Describe it.", (np.zeros((0, 4, 3), np.uint8),)),),
    }
    wrong = {reason: engine.submit(Request(reason, turns)) for reason, turns in bad.items()}
    right = [engine.submit(request) for request in good]
    for reason, handle in wrong.items():
        with pytest.raises(EngineError, match=reason):
            handle.result(60)
    assert all(handle.result(60).tokens > 0 for handle in right)
