"""How the next token is chosen from logits, each row with its own parameters."""

from collections.abc import Sequence

import torch

from sharegpt4v.engine.base import SamplingParams


def pick_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generated: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """One token a row: logits (B, V) float32 -> (B,) int64.

    generated: the tokens each row has produced so far; the repetition penalty divides their positive
    logits and multiplies their negative ones (Keskar et al. 2019), and never sees the prompt.
    Raises ValueError when a row's logits are not finite numbers.
    """
    if not torch.isfinite(logits.amax(-1)).all():
        raise ValueError("the model's logits are not finite")
    for row, (param, seen) in enumerate(zip(params, generated, strict=True)):
        if param.repetition_penalty != 1.0 and seen:
            index = torch.tensor(sorted(set(seen)), device=logits.device)
            values = logits[row, index]
            logits[row, index] = torch.where(
                values > 0, values / param.repetition_penalty, values * param.repetition_penalty
            )
    tokens = logits.argmax(-1)
    for row, param in enumerate(params):
        if param.temperature > 0:
            tokens[row] = _sample(logits[row], param, generators[row])
    return tokens


def _sample(logits: torch.Tensor, param: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """One draw from logits (V,) after temperature, top_k, then top_p."""
    logits = logits / param.temperature
    if param.top_k:
        smallest = logits.topk(min(param.top_k, logits.shape[-1])).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    # A token stays while the mass before it is below top_p, so the likeliest always stays.
    probabilities[probabilities.cumsum(-1) - probabilities >= param.top_p] = 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order[drawn].squeeze(0)
