"""Chooses the next tokens from logits, for each slot with its own parameters and its own random numbers."""

import random
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sharegpt4v.dialogue import SamplingParams

_GREEDY = SamplingParams()

_LEAST_TEMPERATURE = 1e-30
"""The smallest divisor of float32 logits that cannot overflow, once the best logit is 0."""


class TokenSampler:
    """Sampling state of every slot. Slots with default parameters take one argmax together.

    The random numbers come from the request's seed and not from the device: the same seed samples the same
    answer on a CPU and on a GPU, as far as their logits agree.
    """

    def __init__(self, slots: int, eos_token_ids: Collection[int], device: torch.device) -> None:
        self._params = [_GREEDY] * slots
        self._random = [random.Random(0)] * slots
        self._generated = [0] * slots
        self._eos = torch.tensor(sorted(eos_token_ids), device=device)
        self._penalty = torch.ones(slots, 1, device=device)
        self._seen: Tensor | None = None  # (slots, vocabulary) bool, made for the first penalty

    def admit(self, slot: int, params: SamplingParams, seed: int) -> None:
        """Sets the parameters and the seed of the request that begins in this slot."""
        self._params[slot] = params
        self._random[slot] = random.Random(seed)
        self._generated[slot] = 0
        self._penalty[slot] = params.repetition_penalty
        if self._seen is not None:
            self._seen[slot] = False

    def move(self, source: int, target: int) -> None:
        self._params[target] = self._params[source]
        self._random[target] = self._random[source]
        self._generated[target] = self._generated[source]
        self._penalty[target] = self._penalty[source]
        if self._seen is not None:
            self._seen[target] = self._seen[source]

    def pick(self, logits: Tensor, slots: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Chooses one token for each slot: logits (n, V) float32, row i those of slots[i].

        Returns the tokens, and for each whether its logits were numbers. The repetition penalty divides
        positive logits of tokens generated before and multiplies negative ones (Keskar et al. 2019,
        arXiv 1909.05858); tokens of the prompt do not count.
        """
        params = [self._params[slot] for slot in slots]
        finite = torch.isfinite(logits.amax(-1))
        index = torch.tensor(slots, device=logits.device)
        penalised = any(param.repetition_penalty != 1.0 for param in params)
        if penalised:
            logits = self._penalise(logits, index)
        early = [
            row
            for row, (slot, param) in enumerate(zip(slots, params, strict=True))
            if self._generated[slot] < param.min_new_tokens
        ]
        if early:
            logits[torch.tensor(early, device=logits.device)[:, None], self._eos] = -torch.inf
        tokens = logits.argmax(-1)
        drawn = [row for row, param in enumerate(params) if param.temperature > 0]
        if drawn:
            numbers = [self._random[slots[row]].random() for row in drawn]
            tokens[drawn] = _draw(logits[drawn].nan_to_num(), [params[row] for row in drawn], numbers)
        if penalised:
            assert self._seen is not None
            self._seen[index, tokens] = True
        for slot in slots:
            self._generated[slot] += 1
        chosen, numeric = torch.stack([tokens, finite.long()]).tolist()
        return chosen, [bool(flag) for flag in numeric]

    def _penalise(self, logits: Tensor, index: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(
                len(self._params), logits.shape[1], dtype=torch.bool, device=logits.device
            )
        penalty = self._penalty[index]
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self._seen[index], lowered, logits)


def _draw(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """Draws a token per row of logits (n, V) by temperature, top_k, then top_p; numbers: uniform, [0, 1)."""

    vocabulary = logits.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    best = logits.amax(-1, keepdim=True)
    scaled = (logits - best) / column([max(param.temperature, _LEAST_TEMPERATURE) for param in params])
    ranked, order = scaled.sort(descending=True, stable=True)
    probabilities, ranks = ranked.softmax(-1), torch.arange(vocabulary, device=logits.device)
    # All that equal the k-th best are kept, as transformers does: of equal tokens none is better.
    most = column([min(param.top_k or vocabulary, vocabulary) for param in params]).long()
    probabilities = probabilities.masked_fill(ranked < ranked.gather(1, most - 1), 0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    # A token is kept while the mass before it is below top_p, so the likeliest is always kept.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(
        (before >= column([param.top_p for param in params])) & (ranks > 0), 0
    )
    sums = probabilities.cumsum(-1)
    # The first token whose cumulated mass exceeds the number; the last one with any mass at most.
    place = (sums <= column(numbers) * sums[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(place, last)).squeeze(1)
