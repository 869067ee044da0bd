"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of a language model.

They are our own and not peft's: peft needs accelerate, and transformers imports accelerate wherever it is
installed, which makes every command start more slowly. Outputs, gradients and merged weights equal peft's
(tests/train/test_lora.py, where peft is installed; measured with peft 0.21.2: merged weights bit-equal).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharegpt4v.models.freeze import part_of
from sharegpt4v.train.packed_model import PackedModel


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """rank: of the adapters. alpha: their product is scaled by alpha / rank."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """Computes W x + b + (alpha / rank) B A x.

    lora_a: A, (rank, in_features). lora_b: B, (out_features, rank), zero at first, so that the layer begins
    as the one it replaces. `weight` and `bias` keep their names, and are the tensors of that layer. All are
    parameters of one module: ZeRO-3 gathers them together.
    """

    def __init__(self, linear: nn.Linear, settings: LoraSettings, generator: torch.Generator) -> None:
        with torch.device("meta"):  # the tensors are `linear`'s
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = settings.scale
        bound = 1 / math.sqrt(linear.in_features)  # peft's default for A
        first = torch.empty((settings.rank, linear.in_features)).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(first.to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros((linear.out_features, settings.rank)))

    def forward(self, values: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(values, self.lora_a), self.lora_b)
        return super().forward(values) + self.scale * low


def add_adapters(model: PackedModel, settings: LoraSettings, seed: int) -> list[str]:
    """Puts adapters beside all linear layers of the decoder and freezes the rest of the language model.

    Word embeddings and head get none. The other parts of the model stay frozen or trained as they are.
    seed: of the first values of A, the same on every worker. Returns the names of the adapters' tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.model.named_parameters():
        if part_of(name) == "language":
            parameter.requires_grad_(False)
    for layer in list(model.decoder.layers.modules()):
        for name, child in list(layer.named_children()):
            if type(child) is nn.Linear:
                setattr(layer, name, LoraLinear(child, settings, generator))
    return [name for name, _ in model.model.named_parameters() if is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Returns whether a parameter of this name belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def merge_adapters(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights with W + (alpha / rank) B A in place of each W that has an adapter, and no adapter.

    model: whose names `weights` has, every parameter once. Weights without an adapter are passed on as they
    are. At most the three tensors of one layer are held.
    """
    scales = {name: module.scale for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    held: dict[str, _Parts] = {}
    for name, tensor in weights:
        place, _, kind = name.rpartition(".")
        if place not in scales or kind == "bias":
            yield name, tensor
            continue
        parts = held.setdefault(place, _Parts())
        setattr(parts, kind, tensor)
        if (merged := parts.merged(scales[place])) is not None:
            del held[place]
            yield f"{place}.weight", merged
    if held:
        raise ValueError(f"{len(held)} layers without all of weight, lora_a and lora_b, {min(held)} first")


@dataclass
class _Parts:
    """The tensors of one layer that have come so far."""

    weight: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def merged(self, scale: float) -> Tensor | None:
        """Computes the product in float32, whatever the weights' type; None while a tensor is missing."""
        if self.weight is None or self.lora_a is None or self.lora_b is None:
            return None
        added = scale * (self.lora_b.float() @ self.lora_a.float())
        return (self.weight.float() + added).to(self.weight.dtype)
