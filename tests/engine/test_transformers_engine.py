"""The transformers engine with families whose processors make their tensors in different ways."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from transformers import GenerationConfig, ProcessorMixin

from sharegpt4v.dialogue import Completion, Image, Request, SamplingParams, Turn
from sharegpt4v.engine.handle import EngineClosed, EngineError
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.engine.transformers_engine import TransformersEngine
from sharegpt4v.models.load import load_adapter
from sharegpt4v.models.vlm import Vlm, load_vlm
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.images import write_images
from tests.engine.vlm_requests import GREEDY, mixed, picture
from tests.models.tiny_vlms import save_idefics, save_qwen, save_toy_llava

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen": save_qwen,
    "idefics": save_idefics,
    "llava": save_toy_llava,
}


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    torch.set_num_threads(1)
    return load_vlm(FAMILIES[request.param](tmp_path_factory.mktemp("vlm") / request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    torch.set_num_threads(1)
    return load_vlm(save_qwen(tmp_path_factory.mktemp("vlm") / "qwen"))


@contextmanager
def running(vlm: Vlm, capacity: int = 8) -> Iterator[TransformersEngine]:
    with closing(TransformersEngine(vlm, "tiny@0", capacity, threads=1)) as engine:
        yield engine


def alone(vlm: Vlm, request: Request) -> list[int]:
    """transformers' own greedy tokens of one request, without our steps."""
    settings = GenerationConfig(
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(vlm.eos_token_ids),
        pad_token_id=vlm.pad_token_id,
    )
    inputs = vlm.encode(request.turns)
    ids: Any = vlm.model.generate(**inputs, generation_config=settings)
    return list(ids[0, inputs["input_ids"].shape[1] :].tolist())


def text_of(vlm: Vlm, tokens: list[int]) -> str:
    kept = tokens[:-1] if tokens[-1] in vlm.eos_token_ids else tokens
    return str(vlm.tokenizer.decode(kept, skip_special_tokens=True)).strip()


def test_batched_greedy_answers_are_those_of_generate_alone(vlm: Vlm) -> None:
    requests = mixed(18)
    with running(vlm) as engine:
        handles = [engine.submit(request) for request in requests]
        answers = [handle.result(120) for handle in handles]
        stats = engine.stats()
    wanted = [alone(vlm, request) for request in requests]
    assert [answer.tokens for answer in answers] == [len(tokens) for tokens in wanted]
    assert [answer.text for answer in answers] == [text_of(vlm, tokens) for tokens in wanted]
    assert len(set(answer.text for answer in answers)) > 9  # the model looks at what it is asked
    assert (stats.requests, stats.begun, stats.failed) == (18, 18, 0)
    assert stats.new_tokens == sum(map(len, wanted)) and stats.live_steps == stats.new_tokens - 18
    assert stats.live_steps < stats.slot_steps < 18 * 24  # in batches, in which short answers wait


def test_answers_of_the_toy_chat_model_are_the_torch_engines(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_toy_llava(tmp_path / "toy")
    write_images(tmp_path / "world", 12)
    images = sorted((tmp_path / "world").rglob("*.jpg"))
    asked = [
        SamplingParams(max_new_tokens=60),
        SamplingParams(max_new_tokens=60, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=40, min_new_tokens=40),
        SamplingParams(max_new_tokens=60, temperature=0.8, top_p=0.9, top_k=20, seed=5),
    ]
    requests = [
        Request(
            f"r{number}",
            (Turn("user", UNIFIED_CAPTION.text, (_square(path),)),),
            asked[number % len(asked)],
        )
        for number, path in enumerate(images)
    ]
    with running(load_vlm(folder)) as ours:
        answers = [handle.result(120) for handle in [ours.submit(request) for request in requests]]
    with closing(TorchEngine(load_adapter(folder), "toy@0", capacity=4, threads=1)) as engine:
        wanted = [handle.result(120) for handle in [engine.submit(request) for request in requests]]
    assert answers == wanted
    assert len(requests) == 10 and all(len(answer.text) > 20 for answer in answers)


def _square(path: Path) -> Image:
    return np.asarray(PillowImage.open(path).convert("RGB").resize((48, 48), PillowImage.Resampling.BICUBIC))


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_company(vlm: Vlm) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=1.0, top_p=0.95, repetition_penalty=1.2)
    requests = mixed(9, params)
    with running(vlm) as engine:
        together = [handle.result(60) for handle in [engine.submit(request) for request in requests]]
    with running(vlm, capacity=1) as engine:
        lone = [engine.submit(request).result(60) for request in requests]
        again = engine.submit(replace(requests[0], sampling=replace(params, seed=1))).result(60)
    assert together == lone
    assert again != lone[0]


def test_a_stream_joins_to_the_text_and_ends_before_its_stop_string(vlm: Vlm) -> None:
    request = mixed(1)[0]
    whole = text_of(vlm, alone(vlm, request))
    stop = whole[len(whole) // 2 :][:3]
    cut = replace(request, stream=True, sampling=replace(GREEDY, stop=(stop,)))
    with running(vlm) as engine:
        streamed = engine.submit(replace(request, stream=True))
        stopped = engine.submit(cut)
        pieces = list(streamed)
        assert "".join(pieces) == streamed.result(0).text == whole and len(pieces) > 3
        assert stopped.result(60).text == whole[: whole.index(stop)].rstrip() == "".join(stopped)
        assert stopped.result(0).finish_reason == "stop"


def test_one_bad_request_fails_alone(vlm: Vlm) -> None:
    good = mixed(4)
    bad = [
        Request("no question", (Turn("user", "A?"), Turn("assistant", "B."))),
        Request("too long", (Turn("user", "tree " * 2_000),)),
        Request("no pixels", (Turn("user", "Describe it.", (np.zeros((0, 4, 3), np.uint8),)),)),
        Request("not an image", (Turn("user", "Describe it.", (np.zeros((8, 8, 5), np.float32),)),)),
    ]
    with running(vlm) as engine:
        wrong = [engine.submit(request) for request in bad]
        right = [engine.submit(request) for request in good]
        for handle, reason in zip(
            wrong, ("ends with the user", "the context", *["expected uint8"] * 2), strict=True
        ):
            with pytest.raises(EngineError, match=reason):
                handle.result(60)
        assert [h.result(60).text for h in right] == [text_of(vlm, alone(vlm, r)) for r in good]


def test_a_request_that_breaks_its_batch_fails_alone(qwen: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = mixed(8)
    wanted = [text_of(qwen, alone(qwen, request)) for request in requests]
    encode = qwen.encode

    def one_patch_short(turns: Any) -> Any:
        encoded = encode(turns)
        if turns is requests[5].turns:
            encoded["pixel_values"] = encoded["pixel_values"][:-4]
        return encoded

    monkeypatch.setattr(qwen, "encode", one_patch_short)
    with running(qwen) as engine:
        handles = [engine.submit(request) for request in requests]
        with pytest.raises(EngineError):
            handles[5].result(60)
        right = [number for number in range(8) if number != 5]
        assert [handles[n].result(60).text for n in right] == [wanted[n] for n in right]
        assert engine.stats().failed == 1


def _endless(number: int, **more: Any) -> Request:
    params = SamplingParams(max_new_tokens=900, min_new_tokens=900)
    return Request(f"endless {number}", (Turn("user", "Describe it.", (picture(number),)),), params, **more)


def test_cancelled_expired_and_closed_requests_end_within_a_few_tokens(qwen: Vlm) -> None:
    engine = TransformersEngine(qwen, "tiny@0", capacity=4, threads=1)
    cancelled = engine.submit(_endless(1, stream=True))
    next(iter(cancelled))
    cancelled.cancel()
    assert cancelled.result(2).finish_reason == "cancelled"
    # Whether they share a batch or not: `kept` alone takes longer than half a second.
    kept, expired = engine.submit(_endless(0, stream=True)), engine.submit(_endless(2, timeout=0.5))
    with pytest.raises(EngineError, match="not finished within its 0.5 s"):
        expired.result(4)
    waiting = engine.submit(mixed(1)[0])
    assert not kept.done()
    engine.close()
    for handle in (kept, waiting):
        with pytest.raises(EngineClosed):
            handle.result(0)
    with pytest.raises(EngineClosed):
        engine.submit(mixed(1)[0])


def test_numbers_that_are_none_fail_their_request_alone(qwen: Vlm) -> None:
    requests = mixed(2)[:1] * 3
    wanted = text_of(qwen, alone(qwen, requests[0]))

    def spoil(model: Any, inputs: Any, output: Any) -> None:
        if len(output.logits) == 3:
            output.logits[1] = torch.nan

    with contextlib.ExitStack() as stack, running(qwen) as engine:
        stack.callback(qwen.model.register_forward_hook(spoil).remove)
        handles = [engine.submit(request) for request in requests]
        with pytest.raises(EngineError, match="logits are not numbers after 0 tokens"):
            handles[1].result(60)
        assert handles[0].result(60).text == handles[2].result(60).text == wanted


def test_out_of_memory_halves_the_batch_and_costs_no_request(
    qwen: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [mixed(1)[0]] * 8
    wanted = text_of(qwen, alone(qwen, requests[0]))
    generate, tried = qwen.model.generate, []

    def bounded(**inputs: Any) -> Any:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("of a device that holds two")
        return generate(**inputs)

    monkeypatch.setattr(qwen.model, "generate", bounded)
    with running(qwen) as engine:
        handles = [engine.submit(request) for request in requests]
        assert [handle.result(60).text for handle in handles] == [wanted] * 8
        assert engine.capacity == 2
    assert [size for size in tried if size > 2] in ([8, 4], [7, 3], [6, 3], [5], [4], [3])


def test_a_request_without_memory_for_it_alone_fails_alone(
    qwen: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = qwen.model.generate

    def bounded(**inputs: Any) -> Any:
        if len(inputs["pixel_values"]) > 100:
            raise torch.OutOfMemoryError("too many patches")
        return generate(**inputs)

    monkeypatch.setattr(qwen.model, "generate", bounded)
    large = Request("large", (Turn("user", "Describe it.", (picture(0, 200, 200),)),), GREEDY)
    with running(qwen, capacity=1) as engine:
        handles = [engine.submit(request) for request in (large, mixed(1)[0])]
        with pytest.raises(EngineError, match="too many patches"):
            handles[0].result(60)
        assert isinstance(handles[1].result(60), Completion)


def test_control_strings_stay_text_or_are_refused_by_name(vlm: Vlm) -> None:
    """All of the model's tokenizer. Idefics3's processor writes images into the text before it is encoded."""
    controls = vlm.tokenizer.get_added_vocab()
    knows = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
    refused = set(controls) if vlm.name == "idefics" or not knows else set()  # transformers < 5.20
    plain = vlm.encode((Turn("user", "Describe it.", (picture(0),)),))["input_ids"][0].tolist()
    assert len(controls) > 4 or vlm.name == "llava"
    for control, index in controls.items():
        turns = (Turn("user", f"Describe {control} it.", (picture(0),)),)
        if control in refused:
            with pytest.raises(
                ValueError, match=f"the text holds {re.escape(control)}, which the processor of"
            ):
                vlm.encode(turns)
            continue
        ids = vlm.encode(turns)["input_ids"][0].tolist()
        assert ids.count(index) == plain.count(index) and len(ids) > len(plain) + 1, control
        assert control in vlm.tokenizer.decode(ids[-40:])
