"""CUDA graphs of the decode step: its hundreds of small kernels are launched as one.

A graph has fixed shapes, so slots are rounded up, and live positions where all slots read up to the longest;
each pair of sizes is captured the first time it is met.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LEAST_ROWS, _LIVE_STEP = 8, 256
"""Slots are rounded up to powers of two from 8 on, live positions to multiples of 256: few graphs."""

Forward = Callable[[Tensor, Tensor, int], Tensor]
"""ids (n,), positions (n,), live positions -> logits (n, V)."""


class StepGraphs:
    """Replays a decode step on one device; all graphs share one pool of memory and one tensor of logits."""

    def __init__(
        self, slots: int, context: int, by_length: bool, vocabulary: int, device: torch.device
    ) -> None:
        """by_length: whether a step over fewer live positions takes less time, so that it gets a graph."""
        self._context = context
        self._live_step = _LIVE_STEP if by_length else context
        self._device = device
        self._ids = torch.zeros(slots, dtype=torch.long, device=device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=device)
        self._logits = torch.zeros(slots, vocabulary, device=device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            # One for all: a library's workspace belongs to a stream, and torch's own one to the first card.
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def step(self, forward: Forward, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits (n, V), valid until the next step. `forward` is the same at every call."""
        count = len(tokens)
        rows, live = bucket(count, max(positions) + 1, len(self._ids), self._context, self._live_step)
        # Rows beyond the last live slot write into position 0 of slots that are free.
        padding = [0] * (rows - count)
        both = torch.tensor([[*tokens, *padding], [*positions, *padding]]).to(self._device)
        self._ids[:rows], self._positions[:rows] = both[0], both[1]
        if (rows, live) not in self._graphs:
            with torch.cuda.device(self._device):
                self._graphs[rows, live] = self._capture(forward, rows, live)
        self._graphs[rows, live].replay()
        return self._logits[:count]

    def _capture(self, forward: Forward, rows: int, live: int) -> torch.cuda.CUDAGraph:
        inputs = (self._ids[:rows], self._positions[:rows], live)
        self._side.wait_stream(torch.cuda.current_stream())
        # Libraries set themselves up in a first run, which may not be captured.
        with torch.cuda.stream(self._side):
            forward(*inputs)
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the card meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            self._logits[:rows].copy_(forward(*inputs))
        return graph


def bucket(rows: int, live: int, slots: int, context: int, live_step: int) -> tuple[int, int]:
    """The sizes of the graph for these: rounded up, never beyond what there is."""
    rounded = max(_LEAST_ROWS, 1 << (rows - 1).bit_length())
    return min(slots, rounded), min(context, -(-live // live_step) * live_step)
