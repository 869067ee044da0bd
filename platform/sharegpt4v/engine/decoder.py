"""A Llama decoder over slots: prefills new prompts and runs one decode step for all slots."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from sharegpt4v.engine.graphs import CudaCapture, StepGraphs
from sharegpt4v.engine.live_attention import AttendLive, load_attend_live
from sharegpt4v.engine.slots import SlotCache, bytes_per_slot, live_mask


def prefill_bytes(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Computes the bytes of one prefill beside the slots: keys, values and one layer's activations."""
    activations = 3 * (int(config.hidden_size) + int(config.intermediate_size)) * tokens * dtype.itemsize
    return bytes_per_slot(config, tokens, dtype) + activations


class Decoder:
    """The language model with its static cache. Logits are float32 for weights of any dtype."""

    def __init__(
        self, model: LlamaForCausalLM, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._device, self._dtype = device, dtype
        self.cache = SlotCache(model.config, slots, context, dtype, device)
        self._attend_live: AttendLive | None = None
        self._graphs: StepGraphs | None = None
        if device.type == "cuda":
            self._attend_live = load_attend_live(self.cache, model.config.num_attention_heads)
            self._graphs = StepGraphs(
                slots,
                context,
                model.config.vocab_size,
                device,
                CudaCapture(device),
                by_length=self._attend_live is None,
            )

    def prefill(self, prompts: Sequence[Tensor], slots: list[int]) -> Tensor:
        """Prefills prompts (T_i, D) into slots. Returns the logits after each: (n, V)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        # Padding is on the right, where causal attention never reads it from a real token: no mask is needed.
        padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        cache = DynamicCache()
        hidden = self._model.model(inputs_embeds=padded, past_key_values=cache, use_cache=True)
        self.cache.fill(slots, cache)
        rows = torch.arange(len(prompts), device=self._device)
        return self._logits(hidden.last_hidden_state[rows, lengths - 1])

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Feeds tokens[i] at positions[i] of slot i. Returns the logits after each: (n, V)."""
        if self._graphs is not None:
            return self._graphs.step(self._step, tokens, positions)
        lengths = [position + 1 for position in positions]
        ids, places = torch.tensor(tokens, device=self._device), torch.tensor(positions, device=self._device)
        if self.cache.better_apart(lengths):
            return self._forward(
                ids, places, lambda layer, query: self.cache.attend_each(layer, query, lengths)
            )
        return self._step(ids, places, max(lengths))

    def _step(self, ids: Tensor, positions: Tensor, live: int) -> Tensor:
        if (attend_live := self._attend_live) is not None:
            keys, values = self.cache.keys, self.cache.values
            return self._forward(
                ids,
                positions,
                lambda layer, query: attend_live(query, keys[layer], values[layer], positions),
            )
        mask = live_mask(positions, live, self._dtype)
        return self._forward(ids, positions, lambda layer, query: self.cache.attend(layer, query, mask))

    def _forward(self, ids: Tensor, positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Runs one token per slot through transformers' own modules; `attend` attends over the cache."""
        model = self._model.model
        hidden = model.embed_tokens(ids[:, None])
        cos, sin = model.rotary_emb(hidden, position_ids=positions[:, None])
        for number, layer in enumerate(model.layers):
            attention = layer.self_attn
            normed = _norm(layer.input_layernorm, hidden)
            query, keys, values = (
                projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, keys = apply_rotary_pos_emb(query, keys, cos, sin)
            self.cache.write(number, positions, keys, values)
            attended = attend(number, query).transpose(1, 2).flatten(2)
            hidden = hidden + attention.o_proj(attended)
            hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
        return self._logits(_norm(model.norm, hidden)[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden).float()
        return logits


def _norm(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """Computes the module's norm in one GPU kernel instead of eight, and with one rounding instead of two."""
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
