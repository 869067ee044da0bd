"""A Llama decoder over slots: prefill of new prompts, and the decode step of all."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from sharegpt4v.engine.graphs import StepGraphs
from sharegpt4v.engine.slots import SlotCache


class Decoder:
    """The language model with its static cache. Logits come out as float32, whatever the weights are."""

    def __init__(
        self, model: LlamaForCausalLM, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._device = device
        self.cache = SlotCache(model.config, slots, context, dtype, device)
        self._graphs = StepGraphs(self._step, slots, context, device) if device.type == "cuda" else None

    def prefill(self, prompts: Sequence[Tensor], slots: list[int]) -> Tensor:
        """Puts prompts (T_i, D) into slots. Returns the logits that follow each: (n, V)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        # Padded on the right: no real token ever sees the padding, so plain causal attention needs no mask.
        padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        cache = DynamicCache()
        hidden = self._model.model(inputs_embeds=padded, past_key_values=cache, use_cache=True)
        self.cache.fill(slots, cache)
        rows = torch.arange(len(prompts), device=self._device)
        return self._logits(hidden.last_hidden_state[rows, lengths - 1])

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Token tokens[i] at positions[i] of slot i. Returns the logits that follow: (n, V)."""
        if self._graphs is not None:
            return self._graphs.step(tokens, positions)
        ids = torch.tensor(tokens, device=self._device)
        return self._step(ids, torch.tensor(positions, device=self._device), max(positions) + 1)

    def _step(self, ids: Tensor, positions: Tensor, live: int) -> Tensor:
        step = self.cache.step(positions, live)
        hidden = self._model.model(
            input_ids=ids[:, None],
            attention_mask=step.mask(),
            position_ids=positions[:, None],
            past_key_values=step,
            use_cache=True,
        )
        return self._logits(hidden.last_hidden_state[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden).float()
        return logits
