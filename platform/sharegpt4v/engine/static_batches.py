"""Which encoded prompts may be answered in one batch, and the tensors of that batch.

A processor names the tensors of an image as its family needs them. Those of several requests are joined along
their first axis, as processors themselves do; requests whose tensors do not fit together are not batched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sharegpt4v.engine.handle import Handle

_LENGTH_RATIO = 1.5
"""The longest prompt of a batch is at most so many times as long as the shortest: padding is computed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's inputs of the model by name, input_ids (1, T) among them. limit: most new tokens."""

    handle: Handle
    inputs: Mapping[str, Tensor]
    limit: int

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def kind(self) -> frozenset[tuple[object, ...]]:
        """Equal for prompts that fit together: names, types, and shapes but for first axis and text."""
        return frozenset(
            (name, tensor.dtype, None if self._is_text(tensor) else tensor.shape[1:])
            for name, tensor in self.inputs.items()
        )

    def _is_text(self, tensor: Tensor) -> bool:
        """Returns whether a tensor has an entry for each token."""
        return tensor.shape[:2] == self.inputs["input_ids"].shape

    def padded(self, name: str, tokens: int, value: int) -> Tensor:
        """Returns an input, padded on the left to so many tokens where it has an entry for each."""
        tensor = self.inputs[name]
        if not self._is_text(tensor):
            return tensor
        behind = (0, 0) * (tensor.ndim - 2)
        return pad(tensor, (*behind, tokens - tensor.shape[1], 0), value=value)


def choose_batch(prompts: Mapping[int, Prompt]) -> list[int]:
    """Returns the slots of the prompts to be answered next: the oldest, and those that fit to it, by length.

    prompts: by slot, in the order of their arrival.
    """
    oldest = next(iter(prompts.values()))
    fitting = sorted((prompt.tokens, slot) for slot, prompt in prompts.items() if prompt.kind == oldest.kind)
    # Begin at the shortest for which the oldest is not too long.
    first = next(i for i, (tokens, _) in enumerate(fitting) if oldest.tokens <= tokens * _LENGTH_RATIO)
    return [slot for tokens, slot in fitting[first:] if tokens <= fitting[first][0] * _LENGTH_RATIO]


def join(prompts: Sequence[Prompt], pad_token: int, device: torch.device) -> dict[str, Tensor]:
    """Joins prompts of one kind as one batch on the device, padded on the left to the longest."""
    longest = max(prompt.tokens for prompt in prompts)
    return {
        name: torch.cat(
            [prompt.padded(name, longest, pad_token if name == "input_ids" else 0) for prompt in prompts]
        ).to(device)
        for name in prompts[0].inputs
    }
