"""Log probabilities of tokens and of given answers are transformers'."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from tests.engine.requests import SteppingDecoder, make_image, make_request
from tests.models.random_weights import save_random_lmm


@pytest.fixture(scope="module")
def lmm(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return load_adapter(save_random_lmm(tmp_path_factory.mktemp("lmm")))


@torch.inference_mode()
def _logprobs(adapter: Adapter, request: Request, tokens: list[int]) -> torch.Tensor:
    """transformers' log probabilities (T, V) before each of `tokens` behind the prompt."""
    [prompt] = adapter.embed([replace(request, options=())])
    table = adapter.language_model.get_input_embeddings()
    whole = torch.cat([prompt, table(torch.tensor(tokens, dtype=torch.long))])
    logits: torch.Tensor = adapter.language_model(inputs_embeds=whole[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "top_k": 3}, {"repetition_penalty": 1.7}])
def test_log_probabilities_of_tokens_are_transformers(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, float], captured: bool
) -> None:
    if captured:
        monkeypatch.setattr("sharegpt4v.engine.torch_engine.Decoder", SteppingDecoder)
    asked = make_request(adapter, 1, "Analyze.", logprobs=3, min_new_tokens=12, **sampling)
    others = [make_request(adapter, n, max_new_tokens=4 + n) for n in range(2, 6)]
    with closing(TorchEngine(adapter, "toy@0", capacity=4)) as engine:
        handles = [engine.submit(request) for request in (others[0], asked, *others[1:])]
        answer = handles[1].result(60)
        assert not handles[0].result(60).logprobs
    tokens = list(answer.token_ids)
    expected = _logprobs(adapter, asked, tokens)
    assert [entry.token for entry in answer.logprobs] == tokens
    for row, entry in zip(expected, answer.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        best = row.topk(3)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry.top[0][0] == int(best.indices[0])


def test_steps_copy_logits_only_while_a_request_wants_log_probabilities(adapter: Adapter) -> None:
    logits = torch.zeros(1, 8)
    with closing(TorchEngine(adapter, "toy@0", capacity=4)) as engine:

        def are_copied() -> bool:
            return engine._sampler.unchanged(logits) is not logits

        for cancel in (False, True):
            length = 400 if cancel else 40
            sampling: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "logprobs": 2}
            asked = engine.submit(replace(make_request(adapter, 1, **sampling), stream=True))
            next(iter(asked))
            assert are_copied()
            if cancel:
                asked.cancel()
            asked.result(60)
            assert not are_copied()


def test_options_are_scored_as_transformers_does(lmm: Adapter) -> None:
    options = ("yes", "no, it is a tall green tree", "A", "a red square above two blue circles")
    requests = [
        Request(f"o{n}", (Turn("user", "Which?" * (n + 1), (make_image(lmm, n),)),), options=options)
        for n in range(3)
    ]
    with closing(TorchEngine(lmm, "toy@0", capacity=4, prefill_tokens=100)) as engine:
        company = engine.submit(make_request(lmm, 9, max_new_tokens=30, min_new_tokens=30))
        answers = [handle.result(60) for handle in [engine.submit(request) for request in requests]]
        assert company.result(60).tokens == 30
        assert engine.stats().requests == 4
    for request, answer in zip(requests, answers, strict=True):
        for option, score in zip(options, answer.options, strict=True):
            ids = lmm.template.continuation(request.turns, option)
            rows = _logprobs(lmm, request, ids)
            expected = rows.gather(1, torch.tensor(ids)[:, None]).sum().item()
            assert score.tokens == len(ids)
            assert score.logprob == pytest.approx(expected, abs=1e-4)
        best = max(range(len(options)), key=lambda number: answer.options[number].logprob)
        assert (answer.text, answer.tokens, answer.finish_reason) == (options[best], 0, "stop")


def test_options_whose_logits_are_no_numbers_fail_their_request_alone(
    lmm: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = Decoder.prefill

    def poisoned(self: Decoder, prompts: Any) -> torch.Tensor:
        logits = prefill(self, prompts)
        logits[[row for row, (_, part) in enumerate(prompts) if len(part) == bad]] = torch.nan
        return logits

    asked = [Request(q, (Turn("user", q),), options=("yes", "no")) for q in ("Which of them?", "Which?")]
    bad = lmm.prompt_tokens(asked[0].turns)
    monkeypatch.setattr(Decoder, "prefill", poisoned)
    with closing(TorchEngine(lmm, "toy@0", capacity=4)) as engine:
        handles = [engine.submit(request) for request in asked]
        with pytest.raises(EngineError, match="options are not numbers"):
            handles[0].result(60)
        assert len(handles[1].result(60).options) == 2


def test_an_option_is_encoded_as_training_encodes_an_answer(lmm: Adapter) -> None:
    turns = (Turn("user", "Which?"),)
    whole = lmm.template.example([*turns, Turn("assistant", "no, a tree")])
    labelled = [label for label in whole.labels if label != -100]
    assert lmm.template.continuation(turns, "no, a tree") == labelled[:-1]


def test_an_option_without_text_fails_its_request(lmm: Adapter) -> None:
    with closing(TorchEngine(lmm, "toy@0", capacity=2, max_context=200)) as engine:
        empty = Request("e", (Turn("user", "Which?"),), options=("yes", ""))
        long = Request("l", (Turn("user", "Which?"),), options=("yes " * 300,))
        for request, why in ((empty, "has no token"), (long, "context 200")):
            with pytest.raises(EngineError, match=why) as raised:
                engine.submit(request).result(60)
            assert raised.value.kind == "bad_request"


def test_a_system_turn_takes_the_place_of_the_templates_line(lmm: Adapter, adapter: Adapter) -> None:
    plain, told, silent = (
        lmm.template.prompt((*system, Turn("user", "Who?")))
        for system in ((), (Turn("system", "You are a poet."),), (Turn("system", ""),))
    )
    text = lmm.tokenizer.decode(told)
    assert "You are a poet. USER: Who? ASSISTANT:" in text and "curious" not in text
    assert "curious" in lmm.tokenizer.decode(plain)
    assert lmm.tokenizer.decode(silent).removeprefix("<s>").strip() == "USER: Who? ASSISTANT:"
    with pytest.raises(UserError, match="no place for a system turn"):
        adapter.prompt_tokens((Turn("system", "You are a poet."), Turn("user", "Who?")))
    with pytest.raises(UserError, match="begins and ends with the user and alternates"):
        lmm.prompt_tokens((Turn("user", "Who?"), Turn("system", "Be short.")))
    with pytest.raises(UserError, match="only a user's may have any"):
        Turn("system", "See", (make_image(lmm, 1),))


@pytest.mark.parametrize("count", [-1, 21, "3", 1.5])
def test_a_number_of_alternatives_out_of_bounds_is_refused(count: object) -> None:
    with pytest.raises(UserError, match="expected 0 to 20, or none"):
        SamplingParams(logprobs=count)  # type: ignore[arg-type]
