"""Linear layers of one or several projections of the same input; on CPUs in the order that is read fastest.

torch.nn.functional.linear leaves float32 to MKL, which reads a matrix as it is stored: with the matrix packed
oneDNN took 0.75 to 0.4 of the time for 64 to 8 tokens on an AMD CPU, and cpu_linear.py less than that where
it can be had. In bfloat16 oneDNN took half of that, and torch.nn.functional.linear packs the matrix at every
call.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharegpt4v.engine.cpu_linear import Panels, load_linear
from sharegpt4v.engine.memory import free_memory
from sharegpt4v.errors import UserError

LEAST_PACKED = 500_000
"""Elements of the smallest matrix that is packed: with smaller ones the call costs more than it saves."""


@dataclass(slots=True)
class Linear:
    """Matrix (outputs, inputs) and bias; packed: computes with copies of them in another order."""

    weight: Tensor
    bias: Tensor | None
    packed: Callable[[Tensor], Tensor] | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Computes (N, outputs) from (N, inputs)."""
        if self.packed is not None:
            return self.packed(inputs)
        return F.linear(inputs, self.weight, self.bias)


def join(*parts: nn.Module) -> Linear:
    """Joins projections of one input; their weights become views, so that memory holds them once."""
    for part in parts:
        if type(part) is not nn.Linear:
            raise UserError(
                f"the torch engine runs plain Linear layers and this model has {type(part).__name__}: "
                "merge its adapters into the weights first"
            )
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    weight = _joined([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise UserError("the torch engine needs a bias for all of a layer's projections, or for none")
    return Linear(weight, _joined(biases) if biases else None)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].data
    joined = torch.cat([part.data for part in parts])
    first = 0
    for part in parts:
        part.data = joined[first : first + len(part)]
        first += len(part)
    return joined


def pack(layers: Sequence[Linear]) -> None:
    """Packs large matrices on a CPU; none where the copies would leave less memory than they take.

    The weights stay where they are, since the model's own modules share them. A change of theirs is not seen.
    """
    large = [layer for layer in layers if layer.weight.numel() >= LEAST_PACKED and _can_pack(layer.weight)]
    if not large or 2 * sum(layer.weight.nbytes for layer in large) > free_memory():
        return
    with torch.inference_mode():
        for layer in large:
            layer.packed = _packed(layer.weight, layer.bias)


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if weight.dtype == torch.float32 and (function := load_linear()) is not None:
        return Panels(function, weight, bias)
    return one_dnn(weight, bias)


def one_dnn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Returns the product with a copy of the matrix in oneDNN's order."""
    matrix = torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(inputs: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, matrix, bias, "none", [], "")
        return found

    return product


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False  # a build without oneDNN
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
