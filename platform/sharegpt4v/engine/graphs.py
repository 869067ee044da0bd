"""CUDA graphs of the decode step: one launch replaces those of its hundreds of small kernels.

A graph has fixed shapes, so the number of slots is rounded up, and so are the live positions where all slots
read up to the longest; each pair of sizes is captured when it first occurs.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_LEAST_ROWS, _LIVE_STEP = 8, 256
"""Slots are rounded up to powers of two from 8 on, live positions to multiples of 256, to keep graphs few."""

Forward = Callable[[Tensor, Tensor, int], Tensor]
"""ids (n,), positions (n,), live positions -> logits (n, V)."""


class Captured(Protocol):
    """Captured work that can be replayed on the current contents of its tensors."""

    def replay(self) -> None: ...


class CudaCapture:
    """Captures work on one device as graphs, which share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            # One for all graphs: libraries keep a workspace per stream, and torch's is on the first GPU.
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], object]) -> Captured:
        with torch.cuda.device(self._device):
            self._side.wait_stream(torch.cuda.current_stream())
            # The first run initialises libraries and compiles kernels, which must not be captured.
            with torch.cuda.stream(self._side):
                work()
            torch.cuda.current_stream().wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # thread_local, because other threads of this process may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
            ):
                work()
        return graph


class StepGraphs:
    """Replays a decode step; the graphs of all sizes share their inputs and one tensor of logits."""

    def __init__(
        self,
        slots: int,
        context: int,
        vocabulary: int,
        device: torch.device,
        capture: Callable[[Callable[[], object]], Captured],
        by_length: bool,
    ) -> None:
        """Allocates shared tensors. by_length: whether fewer live positions save time, so get own graphs."""
        self._context = context
        self._live_step = _LIVE_STEP if by_length else context
        self._device = device
        self._capture = capture
        self._ids = torch.zeros(slots, dtype=torch.long, device=device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=device)
        self._logits = torch.zeros(slots, vocabulary, device=device)
        self._graphs: dict[tuple[int, int], Captured] = {}

    def step(self, forward: Forward, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Returns logits (n, V), valid until the next step. `forward` must be the same at every call."""
        count = len(tokens)
        rows, live = bucket(count, max(positions) + 1, len(self._ids), self._context, self._live_step)
        # Padding rows, beyond the last live slot, write into position 0 of free slots.
        padding = [0] * (rows - count)
        both = torch.tensor([[*tokens, *padding], [*positions, *padding]]).to(self._device)
        self._ids[:rows], self._positions[:rows] = both[0], both[1]
        if (rows, live) not in self._graphs:
            ids, places, logits = self._ids[:rows], self._positions[:rows], self._logits[:rows]
            self._graphs[rows, live] = self._capture(lambda: logits.copy_(forward(ids, places, live)))
        self._graphs[rows, live].replay()
        return self._logits[:count]


def bucket(rows: int, live: int, slots: int, context: int, live_step: int) -> tuple[int, int]:
    """Rounds rows and live positions up to a graph's sizes, at most `slots` and `context`."""
    rounded = max(_LEAST_ROWS, 1 << (rows - 1).bit_length())
    return min(slots, rounded), min(context, -(-live // live_step) * live_step)
