"""Tokens on their way from the device: the host takes them while the device computes the next step."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sharegpt4v.dialogue import TokenLogprob
from sharegpt4v.engine.logprobs import Logprobs
from sharegpt4v.engine.running_request import RunningRequest


class InFlight:
    """The tokens of one prefill or step, and the requests that they belong to. Made when the work begins."""

    def __init__(self, kind: Literal["prefill", "step"], device: torch.device) -> None:
        self.kind = kind
        self.requests: Mapping[int, RunningRequest] = {}  # by slot
        self.seconds = 0.0  # that the device took; known once the tokens are there
        self._on_gpu = device.type == "cuda"
        self._began = time.perf_counter()
        if self._on_gpu:
            event: Any = torch.cuda.Event
            self._events = [event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def fetch(
        self,
        picks: Tensor,
        requests: Mapping[int, RunningRequest],
        rows: Mapping[int, int],
        logprobs: Logprobs | None,
    ) -> None:
        """Starts the copies to the host. requests, and their columns in picks (2, n): by slot."""
        self.requests, self._rows, self._logprobs = requests, rows, logprobs
        if logprobs is not None:
            logprobs.fetch()
        if self._on_gpu:
            self._host = torch.empty(picks.shape, dtype=picks.dtype, pin_memory=True)
            self._host.copy_(picks, non_blocking=True)
            self._events[1].record()
        else:
            self._host = picks.clone()
            self.seconds = time.perf_counter() - self._began
        for request in requests.values():
            request.in_flight += 1

    def share(self, step: "InFlight", part: float) -> None:
        """Divides the seconds of a step, just fetched on a CPU, that was one pass with this prefill.

        part: that of the prefill, 0 to 1.
        """
        mine = step.seconds * part
        step.seconds -= mine
        self._began = time.perf_counter() - (step._began - self._began) - mine

    def tokens(self) -> Iterator[tuple[int, RunningRequest, int, bool, TokenLogprob | None]]:
        """Waits for the copies.

        Yields slot, request, token, whether its logits were numbers, and its log probability where wanted.
        """
        if self._on_gpu:
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        tokens, numeric = self._host.tolist()
        logprobs = self._logprobs.by_slot() if self._logprobs is not None else {}
        for slot, request in self.requests.items():
            row = self._rows[slot]
            yield slot, request, tokens[row], bool(numeric[row]), logprobs.get(slot)
