"""CUDA graphs of the decode step: its hundreds of small kernels are launched as one.

A graph has fixed shapes, so slots and live positions are rounded up, and each pair of sizes is captured the
first time it is met.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ROW_STEP, _LIVE_STEP = 8, 128
"""Slots and live positions are rounded up to these: few graphs, little waste."""

Forward = Callable[[Tensor, Tensor, int], Tensor]
"""ids (n,), positions (n,), live positions -> logits (n, V)."""


class StepGraphs:
    """Replays `forward` on one device; all graphs share one pool of memory."""

    def __init__(self, forward: Forward, slots: int, context: int, device: torch.device) -> None:
        self._forward = forward
        self._slots = slots
        self._context = context
        self._ids = torch.zeros(slots, dtype=torch.long, device=device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits (n, V), valid until the next step."""
        count = len(tokens)
        rows, live = bucket(count, max(positions) + 1, self._slots, self._context)
        # Rows beyond the last live slot write into position 0 of slots that are free.
        padding = [0] * (rows - count)
        both = torch.tensor([[*tokens, *padding], [*positions, *padding]])
        self._ids[:rows], self._positions[:rows] = both.to(self._ids.device)
        if (rows, live) not in self._graphs:
            self._graphs[rows, live] = self._capture(rows, live)
        graph, logits = self._graphs[rows, live]
        graph.replay()
        return logits[:count]

    def _capture(self, rows: int, live: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        inputs = (self._ids[:rows], self._positions[:rows], live)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in a first run, which may not be captured
            self._forward(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(*inputs)
        return graph, logits


def bucket(rows: int, live: int, slots: int, context: int) -> tuple[int, int]:
    """The sizes of the graph for these: rounded up, never beyond what there is."""
    return min(slots, -(-rows // _ROW_STEP) * _ROW_STEP), min(context, -(-live // _LIVE_STEP) * _LIVE_STEP)
