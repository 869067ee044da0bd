"""CUDA graphs of the decode step: one launch replaces those of its hundreds of small kernels.

A graph has fixed shapes, so the number of slots is rounded up, and so are the live positions where all slots
read up to the longest. All pairs of sizes are captured at the start, while no slot holds a request: a capture
runs the step once, and no answer may advance twice.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch

_LEAST_ROWS, _LIVE_STEP = 8, 256
"""Slots are rounded up to powers of two from 8 on, live positions to multiples of 256, to keep graphs few."""

Step = Callable[[int, int], object]
"""Number of slots, live positions; computes from and into tensors that stay."""


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
        """Runs `work` once and captures it.

        Raises torch.OutOfMemoryError for a lack of memory at any moment of the capture.
        """
        with torch.cuda.device(self._device):
            self._side.wait_stream(torch.cuda.current_stream())
            # The first run initialises libraries and compiles kernels, which must not be captured.
            with torch.cuda.stream(self._side):
                work()
            torch.cuda.current_stream().wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local, because other threads of this process may use the GPU meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
                ):
                    work()
            except RuntimeError as error:
                # Ending a capture that failed raises an error of its own, which hides the cause.
                for cause in _causes(error):
                    if isinstance(cause, torch.OutOfMemoryError):
                        raise cause from None
                raise
        return graph


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class StepGraphs:
    """Replays a decode step, captured once for each of few sizes."""

    def __init__(
        self,
        slots: int,
        context: int,
        step: Step,
        capture: Callable[[Callable[[], object]], Captured],
        by_length: bool,
    ) -> None:
        """Captures the step. by_length: whether fewer live positions save time, so get own graphs."""
        self._slots, self._context = slots, context
        self._live_step = _LIVE_STEP if by_length else context
        rows = {bucket(rows, 1, slots, context, self._live_step)[0] for rows in range(1, slots + 1)}
        lives = range(self._live_step, context + self._live_step, self._live_step)
        sizes = [(row, min(live, context)) for row in sorted(rows, reverse=True) for live in lives]
        # The largest first: the others find room in its memory.
        self._graphs = {size: capture(partial(step, *size)) for size in sizes}

    def run(self, rows: int, live: int) -> None:
        """Computes a step of at least the first `rows` slots."""
        self._graphs[bucket(rows, live, self._slots, self._context, self._live_step)].replay()


def bucket(rows: int, live: int, slots: int, context: int, live_step: int) -> tuple[int, int]:
    """Rounds rows and live positions up to a graph's sizes, at most `slots` and `context`."""
    return min(slots, rounded_rows(rows)), min(context, -(-live // live_step) * live_step)


def rounded_rows(rows: int) -> int:
    """Rounds a number of slots up to that of a graph, of an engine that has as many."""
    return max(_LEAST_ROWS, 1 << (rows - 1).bit_length())
