"""Products with a float32 matrix on processors with AVX-512: for 8 to 64 rows faster than oneDNN's.

cpu_linear.cpp asks for the next part of the matrix while it computes with this one. On two cores of a Xeon
(2.5 GHz) the matrices of a model of 97 M parameters took 52 ms with 64 rows and 62 ms by oneDNN, with 512
rows 403 and 385.
"""

import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sharegpt4v.engine.cpu_library import call, load_library

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")

_PANEL = 32
"""Outputs that are computed together; PANEL in cpu_linear.cpp."""


class _Scratch(threading.local):
    """Memory that a thread uses for all its products: pages of fresh memory take long to get."""

    held = torch.empty(0)

    def __call__(self, numbers: int) -> Tensor:
        if self.held.numel() < numbers:
            self.held = torch.empty(numbers)
        return self.held


_scratch = _Scratch()


class Panels:
    """A copy of a matrix (outputs, inputs), in panels of 32 outputs, and its bias."""

    def __init__(self, function: Callable[..., None], weight: Tensor, bias: Tensor | None) -> None:
        """Copies the matrix. function: what `load_linear` returns."""
        self._function = function
        self._outputs, inputs = weight.shape
        beyond = -self._outputs % _PANEL
        panels = F.pad(weight, (0, 0, 0, beyond)).view(-1, _PANEL, inputs)
        self._panels = panels.transpose(1, 2).contiguous()
        self._bias = F.pad(weight.new_zeros(self._outputs) if bias is None else bias, (0, beyond))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Computes (N, outputs) from (N, inputs), float32 both."""
        rows, width = inputs.shape
        out = inputs.new_empty(rows, self._outputs)
        tensors = (inputs.contiguous(), self._panels, self._bias, _scratch(inputs.numel()), out)
        call(self._function, tensors, (rows, width, self._outputs))
        return out


@cache
def load_linear() -> Callable[..., None] | None:
    """Returns the product of cpu_linear.cpp, None where it cannot be had.

    Nor where its result is not PyTorch's: the log then says so.
    """
    function: Callable[..., None] | None = getattr(load_library(_SOURCE), "linear_float32", None)
    if function is None:
        return None  # no compiler, or a processor without the instructions
    draw = torch.Generator().manual_seed(0)
    weight, inputs, bias = (torch.randn(shape, generator=draw) for shape in ((83, 1_619), (75, 1_619), (83,)))
    try:
        found, expected = Panels(function, weight, bias)(inputs), F.linear(inputs, weight, bias)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # measured: 1e-4
    except AssertionError:
        log.warning("what the compiler here made of %s computes something else: not used", _SOURCE.name)
        return None
    return function
