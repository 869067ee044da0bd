"""The repetition penalty over generated tokens, as a logits processor: vLLM's own counts the prompt, too.

Keskar et al. 2019, arXiv 1909.05858: logits of tokens generated before are divided where positive, multiplied
where negative. All rows of a step are penalised together, and of each answer only its new tokens are read.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PENALTY = "generated_repetition_penalty"
"""Under this name a request's repetition penalty travels in vLLM's extra arguments."""

_FIRST_WIDTH = 64
"""Tokens that a row of notes has room for at first; it grows as answers do."""


@dataclass(slots=True, eq=False)
class Penalised:
    """One request under a penalty. generated: vLLM's own list of its tokens, which grows.

    read: how many of them are noted. seat: the row of its notes, which stays while vLLM moves the request.
    """

    penalty: float
    generated: list[int]
    read: int = 0
    seat: int | None = None


class Penalties:
    """Notes on the device what was generated, (requests, tokens); a row's end repeats its first token.

    No mask over the vocabulary: a step touches the logits of what was generated, and not all of them.
    """

    def __init__(self, requests: int, device: torch.device) -> None:
        self._tokens = torch.zeros(requests, _FIRST_WIDTH, dtype=torch.long, device=device)

    def apply(self, logits: Tensor, rows: Mapping[int, Penalised]) -> Tensor:
        """logits (n, V), in place. rows: those under a penalty; between calls they come, go and move."""
        begun = {row: entry for row, entry in rows.items() if entry.generated}
        if not begun:
            return logits
        longest = max(len(entry.generated) for entry in begun.values())
        if longest > self._tokens.shape[1]:
            self._tokens = torch.cat([self._tokens, self._tokens[:, :1].expand(-1, longest)], dim=1)
        self._note(begun.values())
        device = self._tokens.device
        index, seats = torch.tensor([(row, entry.seat) for row, entry in begun.items()], device=device).T
        penalty = torch.tensor([[entry.penalty] for entry in begun.values()], device=device)
        tokens = self._tokens[seats, :longest]
        chosen = logits[index[:, None], tokens]
        # Where a token stands twice, the same value is written twice.
        logits[index[:, None], tokens] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
        return logits

    def _note(self, entries: Collection[Penalised]) -> None:
        """Writes down new tokens of all entries at once. Newcomers take rows whose request is gone."""
        taken = {entry.seat for entry in entries}
        free = (seat for seat in range(len(self._tokens)) if seat not in taken)
        fresh = []
        for entry in entries:
            if entry.seat is None:
                entry.seat = next(free)
                self._tokens[entry.seat] = entry.generated[0]
            news = enumerate(entry.generated[entry.read :], start=entry.read)
            fresh += [(entry.seat, place, token) for place, token in news]
            entry.read = len(entry.generated)
        if fresh:
            seats, places, tokens = torch.tensor(fresh, device=self._tokens.device).T
            self._tokens[seats, places] = tokens


def penalty_class() -> type:
    """vLLM takes a class of its own family, so it is made where vLLM is there."""
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class GeneratedPenalty(LogitsProcessor):
        def __init__(self, config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self._penalties = Penalties(config.scheduler_config.max_num_seqs, device)
            self._rows: dict[int, Penalised] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, update: Any) -> None:
            process_dict_updates(self._rows, update, _penalised)

        def apply(self, logits: Tensor) -> Tensor:
            return self._penalties.apply(logits, self._rows) if self._rows else logits

    return GeneratedPenalty


def _penalised(params: Any, prompt: list[int] | None, generated: list[int]) -> Penalised | None:
    penalty = (params.extra_args or {}).get(PENALTY, 1.0)
    return None if penalty == 1.0 else Penalised(penalty, generated)
