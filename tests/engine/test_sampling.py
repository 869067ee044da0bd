"""One token a slot: penalties, cuts, seeds."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper

from sharegpt4v.dialogue import SamplingParams
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.errors import UserError

CPU = torch.device("cpu")


def _sampler(*params: SamplingParams, seed: int = 0, eos: tuple[int, ...] = (0,)) -> TokenSampler:
    sampler = TokenSampler(len(params), 4, eos, CPU)
    for slot, param in enumerate(params):
        sampler.admit(slot, param, seed)
    return sampler


def _pick(sampler: TokenSampler, *logits: list[float]) -> list[int]:
    return _choose(sampler, torch.tensor(logits), range(len(logits)))[0]


def _choose(sampler: TokenSampler, logits: torch.Tensor, slots: Sequence[int]) -> list[list[int]]:
    """Tokens, and whether logits were numbers; the rest of a vocabulary of four is out of reach."""
    padded = torch.nn.functional.pad(logits, (0, 4 - logits.shape[1]), value=-1e4)
    picks: list[list[int]] = sampler.choose(padded, slots).tolist()
    return picks


def test_the_repetition_penalty_sees_generated_tokens_only() -> None:
    sampler = _sampler(SamplingParams(repetition_penalty=1.5), SamplingParams())
    logits = [2.0, 1.9, -1.0]
    assert _pick(sampler, logits, logits) == [0, 0]
    assert _pick(sampler, logits, logits) == [1, 0]  # 2.0 / 1.5 < 1.9, and only for who asked for it
    assert _pick(sampler, [-2.0, -2.5, -2.9], [-2.0, -2.5, -2.9]) == [2, 0]  # -2.0 * 1.5 < -2.9


def test_a_new_request_in_a_slot_has_generated_nothing_yet() -> None:
    sampler = _sampler(SamplingParams(repetition_penalty=1.5))
    assert _pick(sampler, [2.0, 1.9]) == [0]
    sampler.admit(0, SamplingParams(repetition_penalty=1.5), 0)
    assert _pick(sampler, [2.0, 1.9]) == [0]


def test_a_moved_request_takes_its_state_along() -> None:
    sampler = _sampler(SamplingParams(), SamplingParams(repetition_penalty=1.5))
    assert _choose(sampler, torch.tensor([[2.0, 1.9]]), [1])[0] == [0]
    sampler.move(1, 0)
    assert _pick(sampler, [2.0, 1.9]) == [1]


@pytest.mark.parametrize(
    ("params", "seen"),
    [
        (SamplingParams(temperature=5.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.7), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=1e-300), {0}),  # 0 in float32
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.95), {0, 1, 2}),
        (SamplingParams(temperature=3.0), {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_cut_the_tail(params: SamplingParams, seen: set[int]) -> None:
    draws = {_pick(_sampler(params, seed=seed), [3.0, 2.0, 1.0, 0.0])[0] for seed in range(300)}
    assert draws == seen


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 100])
def test_top_k_keeps_of_equal_tokens_what_transformers_keeps(top_k: int) -> None:
    """All that equal the k-th best: of [3, 2, 2, 1] and 2 they keep three."""
    ties = [[3.0, 2.0, 2.0, 1.0], [1.0] * 4, [2.0, 0.0, 2.0, -torch.inf], [0.0, 1.0, 1.0, 1.0]]
    kept = TopKLogitsWarper(top_k)(torch.zeros(1, 1, dtype=torch.long), torch.tensor(ties)).isfinite()
    for logits, wanted in zip(ties, kept, strict=True):
        params = SamplingParams(temperature=2.0, top_k=top_k)
        draws = {_pick(_sampler(params, seed=seed), logits)[0] for seed in range(400)}
        assert draws == set(wanted.nonzero().flatten().tolist())


def test_draws_follow_the_probabilities() -> None:
    sampler = _sampler(SamplingParams(temperature=1.0))
    logits = torch.tensor([0.6, 0.3, 0.1]).log().tolist()
    counts = Counter(_pick(sampler, logits)[0] for _ in range(4_000))
    assert [counts[token] / 4_000 for token in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_a_draw_depends_on_the_seed_and_not_on_the_company() -> None:
    params, logits = SamplingParams(temperature=2.0), [1.0, 0.9, 0.8, 0.7]
    alone, company = _sampler(params, seed=5), TokenSampler(3, 4, (0,), CPU)
    for slot, seed in enumerate((1, 5, 9)):
        company.admit(slot, params, seed)
    first = [_pick(alone, logits)[0] for _ in range(20)]
    assert first == [_pick(company, logits, logits, logits)[1] for _ in range(20)]
    assert len(set(first)) > 1


def test_no_end_token_before_the_minimum() -> None:
    sampler = _sampler(SamplingParams(min_new_tokens=2), SamplingParams())
    logits = [5.0, 1.0]
    assert [_pick(sampler, logits, logits) for _ in range(3)] == [[1, 0], [1, 0], [0, 0]]


def test_logits_that_are_no_numbers_are_told_row_by_row() -> None:
    nan = float("nan")
    sampler = _sampler(*[SamplingParams(temperature=1.0)] * 3)
    logits = torch.tensor([[1.0, nan], [0.0, 1.0], [float("inf"), 0.0]])
    assert _choose(sampler, logits, range(3))[1] == [0, 1, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": float("nan")}, "temperature: nan is refused: expected 0 to 100"),
        ({"temperature": -1.0}, "temperature: -1.0 is refused"),
        ({"top_k": -1}, "top_k: -1 is refused: expected 0 or more"),
        ({"top_p": 1.5}, "top_p: 1.5 is refused: expected above 0, 1 at most"),
        ({"top_p": 0.0}, "top_p: 0.0 is refused: expected above 0, 1 at most"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is refused: expected above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is refused: expected 1 or more"),
        ({"min_new_tokens": -1}, "min_new_tokens: -1 is refused: expected 0 or more"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9 is refused: `max_new_tokens` is 8"),
        ({"stop": ("",)}, r"stop: \('',\) is refused: expected texts"),
        ({"stop": "abc"}, "stop: 'abc' is refused: expected texts"),
        ({"stop": ("a", 5)}, r"stop: \('a', 5\) is refused: expected texts"),
        ({"stop": None}, "stop: None is refused: expected texts"),
        ({"temperature": "hot"}, "temperature: 'hot' is refused: expected a number, 0 to 100"),
        ({"top_p": None}, "top_p: None is refused: expected a number, above 0, 1 at most"),
        ({"max_new_tokens": 7.5}, "max_new_tokens: 7.5 is refused: expected a whole number, 1 or more"),
        ({"seed": "lucky"}, "seed: 'lucky' is refused: expected a whole number, or none"),
    ],
)
def test_values_that_no_decoding_can_follow_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        SamplingParams(**values)


def test_extreme_values_draw_what_their_limits_do() -> None:
    """An index out of range is an error of one request on a CPU, and on a GPU the end of the process."""
    cold = SamplingParams(temperature=1e-40)
    wide = SamplingParams(temperature=1.0, top_k=2**70)
    assert _pick(_sampler(cold), [1.0, 30.0, 29.9]) == [1]
    assert _pick(_sampler(wide), [1.0, 3.0, 2.9]) == _pick(
        _sampler(SamplingParams(temperature=1.0)), [1.0, 3.0, 2.9]
    )
