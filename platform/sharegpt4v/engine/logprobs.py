"""Log probabilities of chosen tokens and of their likeliest alternatives, by the model alone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sharegpt4v.dialogue import TokenLogprob
from sharegpt4v.models.send import send


class Logprobs:
    """Log probabilities of one step for the slots that asked for them, on their way to the host."""

    def __init__(
        self, logits: Tensor, tokens: Tensor, rows: Mapping[int, int], wanted: Mapping[int, int]
    ) -> None:
        """Computes them. logits (n, V) float32, as the model gave them; tokens (n,); rows: of both by slot.

        wanted: the number of alternatives by slot, for the slots that asked.
        """
        index = send([rows[slot] for slot in wanted], logits.device)
        every = logits[index].log_softmax(-1)
        values, ids = every.topk(max(1, *wanted.values()))
        chosen = tokens[index]
        self._counts = dict(wanted)
        self._parts = [chosen, every.gather(1, chosen[:, None])[:, 0], ids, values]

    def fetch(self) -> None:
        """Starts the copies to the host; on a GPU they are there once an event behind them is."""
        for number, part in enumerate(self._parts):
            host = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.device.type == "cuda")
            self._parts[number] = host.copy_(part, non_blocking=True)

    def by_slot(self) -> dict[int, TokenLogprob]:
        """Returns them, once the copies are there."""
        chosen, logprobs, ids, values = (part.tolist() for part in self._parts)
        found = {}
        for row, (slot, count) in enumerate(self._counts.items()):
            top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
            found[slot] = TokenLogprob(chosen[row], logprobs[row], top)
        return found
