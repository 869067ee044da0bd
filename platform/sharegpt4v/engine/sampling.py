"""Chooses the next tokens from logits, for each slot with its own parameters and its own random numbers."""

import random
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sharegpt4v.dialogue import SamplingParams
from sharegpt4v.engine.logprobs import Logprobs
from sharegpt4v.models.send import send

_GREEDY = SamplingParams()

_LEAST_TEMPERATURE = 1e-30
"""The smallest divisor of float32 logits that cannot overflow, once the best logit is 0."""


class TokenSampler:
    """Sampling state of every slot. Penalties and the best tokens of all slots are computed together.

    What is read and written at every step lives on the device, so that a step can be captured (`greedy`,
    `mark`). The random numbers come from the request's seed and not from the device: the same seed samples
    the same answer on a CPU and on a GPU, as far as their logits agree.
    """

    def __init__(
        self, slots: int, vocabulary: int, eos_token_ids: Collection[int], device: torch.device
    ) -> None:
        self._device = device
        self._params = [_GREEDY] * slots
        self._random = [random.Random(0)] * slots
        self._eos = torch.tensor(sorted(eos_token_ids), device=device)
        self._penalty = torch.ones(slots, 1, device=device)
        self._early = torch.zeros(slots, dtype=torch.long, device=device)  # tokens before which none ends
        self._logprobs: dict[int, int] = {}  # number of alternatives, by slot, of those that ask for any
        self._true = torch.ones((), dtype=torch.bool, device=device)
        # A captured step does the same whatever the parameters are; elsewhere what no slot needs is left out.
        self._captured = device.type == "cuda"
        self._seen: Tensor | None = None  # (slots, vocabulary) bool, made for the first penalty
        self._shape = slots, vocabulary
        if self._captured:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=device)

    def admit(self, slot: int, params: SamplingParams, seed: int, tokens: Sequence[int] = ()) -> None:
        """Sets the parameters and the seed of the request that begins in this slot.

        tokens: those it generated before it was interrupted; its random numbers go on behind theirs.
        """
        self._params[slot] = params
        self._random[slot] = random.Random(seed)
        for _ in tokens:
            self._random[slot].random()
        self._logprobs.pop(slot, None)
        if params.logprobs is not None:
            self._logprobs[slot] = params.logprobs
        self._penalty[slot] = params.repetition_penalty
        self._early[slot] = params.min_new_tokens - len(tokens)
        if self._seen is None and params.repetition_penalty != 1.0:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        if self._seen is not None:
            self._seen[slot] = False
            if tokens:
                self._seen[slot, send(tokens, self._device)] = True

    def release(self, slot: int) -> None:
        """Forgets what the request wanted that has left this slot: every step would pay for it."""
        self._params[slot] = _GREEDY
        self._logprobs.pop(slot, None)

    def move(self, source: int, target: int) -> None:
        self._params[target] = self._params[source]
        self._random[target] = self._random[source]
        self._logprobs.pop(target, None)
        if source in self._logprobs:
            self._logprobs[target] = self._logprobs[source]
        self.release(source)
        for tensor in (self._penalty, self._early, self._seen):
            if tensor is not None:
                tensor[target] = tensor[source]

    def unchanged(self, logits: Tensor) -> Tensor:
        """Returns a copy of logits, which `greedy` changes, if log probabilities are wanted of any slot."""
        return logits.clone() if self._logprobs else logits

    def logprobs(self, logits: Tensor, tokens: Tensor, rows: Mapping[int, int]) -> Logprobs | None:
        """Computes the log probabilities of chosen tokens for the slots that want them, None for none.

        logits (n, V) as the model gave them; tokens (n,); rows: of both by slot.
        """
        wanted = {slot: count for slot, count in self._logprobs.items() if slot in rows}
        return Logprobs(logits, tokens, rows, wanted) if wanted else None

    def choose(self, logits: Tensor, slots: Sequence[int]) -> Tensor:
        """Chooses one token for each slot: logits (n, V) float32, changed in place; row i those of slots[i].

        Returns (2, n) int64: the tokens, and for each whether its logits were numbers.
        """
        index = send(slots, self._device, torch.long)
        tokens, numeric = self.greedy(logits, index)
        self.draw(logits, tokens, {slot: row for row, slot in enumerate(slots)})
        self.mark(index, tokens)
        return torch.stack([tokens, numeric])

    def greedy(self, logits: Tensor, index: Tensor, alive: Tensor | int = 1) -> tuple[Tensor, Tensor]:
        """Penalises logits (n, V) of slots index (n,) in place, and returns the best token of each.

        alive: (n,) 1 for a slot that takes its token, 0 for another.

        The repetition penalty divides positive logits of tokens generated before and multiplies negative ones
        (Keskar et al. 2019, arXiv 1909.05858); tokens of the prompt do not count. Also returns 1 for a row
        of numbers and 0 for another.
        """
        numeric = torch.isfinite(logits.amax(-1)).long()
        if self._seen is not None:
            penalty, seen = self._penalty[index], self._seen[index]
            lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(seen, lowered, logits, out=logits)
        if self._captured or any(param.min_new_tokens for param in self._params):
            early = self._early[index]
            ends = logits[:, self._eos]
            logits[:, self._eos] = ends.masked_fill((early > 0)[:, None], -torch.inf)
            self._early[index] = early - alive
        return logits.argmax(-1), numeric

    def draw(self, logits: Tensor, tokens: Tensor, rows: Mapping[int, int]) -> None:
        """Replaces the tokens of slots that sample. rows: the row of `logits` and `tokens` by slot."""
        drawn = {slot: row for slot, row in rows.items() if self._params[slot].temperature > 0}
        if not drawn:
            return
        index = send(list(drawn.values()), self._device)
        numbers = [self._random[slot].random() for slot in drawn]
        tokens[index] = _draw(logits[index].nan_to_num(), [self._params[slot] for slot in drawn], numbers)

    def mark(self, index: Tensor, tokens: Tensor) -> None:
        """Notes tokens (n,) as generated in slots index (n,)."""
        if self._seen is not None:
            self._seen.index_put_((index, tokens), self._true)  # True itself would be copied from the host


def _draw(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """Draws a token per row of logits (n, V) by temperature, top_k, then top_p; numbers: uniform, [0, 1)."""

    vocabulary = logits.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return send(values, logits.device)[:, None]

    best = logits.amax(-1, keepdim=True)
    scaled = (logits - best) / column([max(param.temperature, _LEAST_TEMPERATURE) for param in params])
    ranked, order = scaled.sort(descending=True, stable=True)
    probabilities, ranks = ranked.softmax(-1), torch.arange(vocabulary, device=logits.device)
    # All that equal the k-th best are kept, as transformers does: of equal tokens none is better.
    most = column([min(param.top_k or vocabulary, vocabulary) for param in params])
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
