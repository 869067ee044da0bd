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
"""Key of a request's repetition penalty in vLLM's extra arguments."""

_FIRST_WIDTH = 64
"""Initial width of the token table; it grows with the answers."""


@dataclass(slots=True, eq=False)
class Penalised:
    """One request under a penalty. generated: vLLM's own list of its tokens, which grows.

    recorded: how many of them are in the table. row: its row there, the same when vLLM moves the request.
    """

    penalty: float
    generated: list[int]
    recorded: int = 0
    row: int | None = None


class Penalties:
    """Table (requests, tokens) of generated tokens on the device; each row is padded with its first token.

    There is no mask over the vocabulary, so that a step reads and writes only logits of generated tokens.
    """

    def __init__(self, requests: int, device: torch.device) -> None:
        self._tokens = torch.zeros(requests, _FIRST_WIDTH, dtype=torch.long, device=device)

    def apply(self, logits: Tensor, requests: Mapping[int, Penalised]) -> Tensor:
        """Penalises logits (n, V) in place. requests: by row of the logits; rows may change between calls."""
        begun = {index: request for index, request in requests.items() if request.generated}
        if not begun:
            return logits
        longest = max(len(request.generated) for request in begun.values())
        if longest > self._tokens.shape[1]:
            self._tokens = torch.cat([self._tokens, self._tokens[:, :1].expand(-1, longest)], dim=1)
        self._record(begun.values())
        device = self._tokens.device
        indices, rows = torch.tensor([(index, r.row) for index, r in begun.items()], device=device).T
        penalty = torch.tensor([[request.penalty] for request in begun.values()], device=device)
        tokens = self._tokens[rows, :longest]
        chosen = logits[indices[:, None], tokens]
        # For a token that occurs twice, the same value is written twice.
        logits[indices[:, None], tokens] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
        return logits

    def _record(self, requests: Collection[Penalised]) -> None:
        """Records new tokens of all requests at once. New requests reuse the rows of ended ones."""
        taken = {request.row for request in requests}
        free = (row for row in range(len(self._tokens)) if row not in taken)
        fresh = []
        for request in requests:
            if request.row is None:
                request.row = next(free)
                self._tokens[request.row] = request.generated[0]
            new = enumerate(request.generated[request.recorded :], start=request.recorded)
            fresh += [(request.row, column, token) for column, token in new]
            request.recorded = len(request.generated)
        if fresh:
            rows, columns, tokens = torch.tensor(fresh, device=self._tokens.device).T
            self._tokens[rows, columns] = tokens


def penalty_class() -> type:
    """Makes the logits processor's class. Imports vLLM for its base class, so only when vLLM is installed."""
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
