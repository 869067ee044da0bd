"""The log likelihood of given answers behind one prompt, whose keys and values they share."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharegpt4v.dialogue import Completion, OptionScore, Request
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.llama import Llama
from sharegpt4v.errors import UserError
from sharegpt4v.models.send import send
from sharegpt4v.templates import Template


def option_ids(template: Template, request: Request) -> list[list[int]]:
    """Returns the ids of each option behind the prompt. Raises UserError for one without any."""
    ids = [template.continuation(request.turns, option) for option in request.options]
    for option, tokens in zip(request.options, ids, strict=True):
        if not option.strip() or not tokens:
            raise UserError(f"the option {option!r} has no token to score: give a text")
    return ids


def choose_option(handle: Handle, prompt_tokens: int, scores: Sequence[OptionScore]) -> Completion:
    """Returns the likeliest option as the answer, with the scores of all."""
    best = max(range(len(scores)), key=lambda number: scores[number].logprob)
    return Completion(
        handle.request.options[best],
        0,
        "stop",
        prompt_tokens=prompt_tokens,
        queued_seconds=(handle.begun or handle.submitted) - handle.submitted,
        first_token_seconds=time.monotonic() - handle.submitted,
        options=tuple(scores),
    )


def score_options(
    decoder: Decoder,
    llama: Llama,
    slot: int,
    start: int,
    logits: Tensor,
    ids: Sequence[list[int]],
    budget: int,
) -> list[OptionScore]:
    """Scores options given as ids behind the `start` tokens of a slot.

    logits: (V,) float32 behind the prompt. budget: most tokens that go through the model together.
    """
    first = logits.log_softmax(-1)
    sums = [first[tokens[0]] for tokens in ids]
    for group in _groups([number for number, tokens in enumerate(ids) if len(tokens) > 1], ids, budget):
        parts = [llama.embed(send(ids[number][:-1], logits.device)) for number in group]
        for number, after in zip(group, decoder.score(slot, start, parts), strict=True):
            following = send(ids[number][1:], logits.device)
            sums[number] = sums[number] + after.log_softmax(-1).gather(1, following[:, None]).sum()
    return [
        OptionScore(logprob, len(tokens))
        for logprob, tokens in zip(torch.stack(sums).tolist(), ids, strict=True)
    ]


def _groups(numbers: Sequence[int], ids: Sequence[list[int]], budget: int) -> Iterator[list[int]]:
    group: list[int] = []
    held = 0
    for number in numbers:
        if group and held + len(ids[number]) > budget:
            yield group
            group, held = [], 0
        group.append(number)
        held += len(ids[number])
    if group:
        yield group
