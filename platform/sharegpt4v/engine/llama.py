"""The layers of a Llama decoder over packed tokens, (N, D) whatever dialogues they belong to.

Projections of the same input are joined into one matrix. What surrounds the matrices (norms, rotary
positions, the write into the slots, the gate of the MLP) is chosen with `Kernels`: PyTorch's own operations
here, fused ones in triton_llama.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sharegpt4v.engine.linear import Linear, join, pack
from sharegpt4v.engine.slots import SlotCache, to_stored
from sharegpt4v.errors import UserError


class Heads(NamedTuple):
    """What one layer attends with: query (N, heads, width); keys and values (N, key heads, width)."""

    query: Tensor
    keys: Tensor
    values: Tensor


def split_heads(qkv: Tensor, kept: int, width: int) -> Heads:
    """Returns views of qkv (N, heads x width), of which `kept` heads are keys and as many values."""
    heads = qkv.view(len(qkv), -1, width)
    return Heads(heads[:, : -2 * kept], heads[:, -2 * kept : -kept], heads[:, -kept:])


class Places(NamedTuple):
    """Where N tokens go, (N,) int64 each: position in the dialogue, slot, and position in the slot."""

    positions: Tensor
    slots: Tensor
    cells: Tensor


class Kernels(Protocol):
    """The small operations between the matrices; `hidden` and `qkv` may be overwritten."""

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden + delta and its RMS norm, (N, D) both."""

    def rotate_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, places: Places, keys: Tensor, values: Tensor
    ) -> Heads:
        """Rotates queries and keys of qkv (N, heads x width) and writes keys and values into the slots.

        cos, sin: (N, width) float32. keys, values: one layer of the SlotCache.
        """

    def gate(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, (N, F), for gate_up (N, 2F)."""


class TorchKernels:
    """PyTorch's own operations, for any device."""

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        whole = hidden if delta is None else hidden + delta
        return whole, F.rms_norm(whole, norm.shape, norm, eps)

    def rotate_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, places: Places, keys: Tensor, values: Tensor
    ) -> Heads:
        kept, width = keys.shape[1], keys.shape[3]
        heads = qkv.view(len(qkv), -1, width)
        turned, own_values = heads[:, :-kept], heads[:, -kept:]
        left, right = turned.chunk(2, -1)
        across = torch.cat([-right, left], -1)
        turned = turned * cos.to(qkv.dtype)[:, None] + across * sin.to(qkv.dtype)[:, None]
        query, own_keys = turned[:, :-kept], turned[:, -kept:]
        for cache, own in ((keys, own_keys), (values, own_values)):
            kept_bytes = to_stored(own, cache.dtype)
            if cache.itemsize == 1:  # PyTorch has no indexed write for fp8
                cache, kept_bytes = cache.view(torch.uint8), kept_bytes.view(torch.uint8)
            cache[places.slots, :, places.cells] = kept_bytes
        return Heads(query, own_keys, own_values)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


Attend = Callable[[int, Heads, bool], Tensor]
"""Layer, its heads, whether the queries are only those of the kept rows -> (queries, heads x width)."""


class Llama:
    """The weights of a LlamaForCausalLM, shared with it: its joined projections become views of one matrix.

    On a CPU there is a second, packed copy of large ones, if memory allows it.
    Raises UserError for layers that are not plain Llama: adapters that are not merged, another activation.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        config = model.config
        if config.hidden_act != "silu":
            raise UserError(f"the torch engine runs Llama with silu, not {config.hidden_act!r}")
        self.config = config
        self._model = model
        self._eps: float = config.rms_norm_eps
        self._layers = [self._read(layer) for layer in model.model.layers]
        # Another kind of head is called as it is: benchmarks have one that does nothing.
        self._head = join(model.lm_head) if type(model.lm_head) is nn.Linear else model.lm_head
        linears = [x for layer in self._layers for x in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        pack([*linears, self._head] if isinstance(self._head, Linear) else linears)
        self._norm: Tensor = model.model.norm.weight

    @staticmethod
    def _read(layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            layer.input_layernorm.weight,
            join(attention.q_proj, attention.k_proj, attention.v_proj),
            join(attention.o_proj),
            layer.post_attention_layernorm.weight,
            join(mlp.gate_proj, mlp.up_proj),
            join(mlp.down_proj),
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Returns the embeddings (N, D) of ids (N,)."""
        embeddings: Tensor = self._model.model.embed_tokens(ids)
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (N, V) float32 of normed hidden states."""
        logits: Tensor = self._head(hidden).float()
        return logits

    def run(
        self,
        hidden: Tensor,
        places: Places,
        cache: SlotCache,
        attend: Attend,
        kernels: Kernels,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Runs all layers over embeddings (N, D), writing keys and values into the slots.

        keep: rows (n,) whose result is wanted, all by default: the last layer computes the others' keys and
        values only. Returns normed hidden states, (n, D).
        """
        exact = torch.empty(0, dtype=torch.float32, device=hidden.device)  # names the dtype of cos and sin
        cos, sin = (part[0] for part in self._model.model.rotary_emb(exact, places.positions[None]))
        delta: Tensor | None = None
        for number, layer in enumerate(self._layers):
            hidden, normed = kernels.add_norm(hidden, delta, layer.attention_norm, self._eps)
            heads = kernels.rotate_store(
                layer.qkv(normed), cos, sin, places, cache.keys[number], cache.values[number]
            )
            only_kept = keep is not None and number == len(self._layers) - 1
            if keep is not None and only_kept:
                hidden, heads = hidden[keep], heads._replace(query=heads.query[keep])
            delta = layer.out(attend(number, heads, only_kept))
            hidden, normed = kernels.add_norm(hidden, delta, layer.mlp_norm, self._eps)
            delta = layer.down(kernels.gate(layer.gate_up(normed)))
        if keep is not None and not self._layers:
            hidden = hidden[keep]
        return kernels.add_norm(hidden, delta, self._norm, self._eps)[1]
