"""A deterministic engine without a model, with set speed and faults, for benchmarks and fault tests."""

import hashlib
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharegpt4v.dialogue import Completion, Request
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.engine.worker import run_until_closed, start_thread
from sharegpt4v.errors import UserError

FAULTS = ("kill", "hang", "error", "refusal", "empty", "loop", "length", "once")
_COLOURS = ("red", "green", "blue", "yellow", "grey", "brown", "white", "black")
_THINGS = ("square", "tree", "house", "cat", "boat", "table", "hill", "cup")


@dataclass(frozen=True, slots=True)
class FakeOptions:
    """image_side in pixels. seconds_per_request: time one request takes, whatever else is queued.

    faults: fault name -> regular expression over request ids. kill ends the process with SIGKILL, hang
    never answers, error fails the request, once fails only the first attempt's gate, the others
    answer with a text that the gate must reject.
    """

    image_side: int = 96
    requests_at_once: int = 1024
    seconds_per_request: float = 0.0
    faults: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(FAULTS)
        if unknown:
            raise UserError(f"{sorted(unknown)[0]!r} is unknown; known: {', '.join(FAULTS)}", field="faults")


class FakeEngine:
    """Answers one request at a time from a hash of its images, so that equal pixels get equal captions."""

    def __init__(self, options: FakeOptions) -> None:
        self.options = options
        self.model = "fake@0"
        self.image_size = options.image_side
        self.capacity = options.requests_at_once
        self._faults = {name: re.compile(pattern) for name, pattern in options.faults.items()}
        self._scheduler: Scheduler[Any] = Scheduler(slots=1)
        self._thread = start_thread("fake-engine", lambda: run_until_closed(self._scheduler, self._step))

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking. Raises EngineClosed once the engine is closed."""
        return self._scheduler.submit(request)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def close(self) -> None:
        """Fails unfinished requests with EngineClosed and joins the engine's thread."""
        self._scheduler.close()
        self._thread.join()

    def _step(self) -> None:
        self._scheduler.receive()
        for slot, handle in self._scheduler.admit().items():
            try:
                self._answer(slot, handle)
            except Exception as error:
                self._scheduler.fail(slot, error)

    def _answer(self, slot: int, handle: Handle) -> None:
        request = handle.request
        if self.options.seconds_per_request:
            time.sleep(self.options.seconds_per_request)
        if self._scheduler.drop_withdrawn(slot):
            return
        fault = self._fault(request)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            self._scheduler.wait_closed()
            return
        if fault == "error":
            raise EngineError("the fake engine fails this request, as its faults say")
        completion = _faulty(fault) or _describe(request)
        handle.push(completion.text)
        self._scheduler.count(new_tokens=completion.tokens)
        self._scheduler.finish(slot, completion)

    def _fault(self, request: Request) -> str | None:
        for name, pattern in self._faults.items():
            if pattern.search(request.id):
                return "refusal" if name == "once" and request.sampling.temperature == 0 else name
        return None


def _faulty(fault: str | None) -> Completion | None:
    if fault == "refusal":
        return Completion("I'm sorry, but I cannot help with this image.", 11, "stop")
    if fault == "empty":
        return Completion("", 1, "stop")
    if fault == "loop":
        return Completion("A cat sits on the mat. " * 40, 320, "length")
    if fault == "length":
        return Completion("The picture shows a long street that goes on past the houses and", 14, "length")
    return None


def _describe(request: Request) -> Completion:
    """Returns a caption of one to three sentences, chosen by the pixels and the sampling seed."""
    digest = hashlib.blake2b(digest_size=16)
    for image in request.images:
        digest.update(image.data if image.flags.c_contiguous else image.tobytes())
    if request.sampling.temperature > 0:
        digest.update(str(request.sampling.seed).encode())
    draw = digest.digest()
    sentences = [
        f"A {_COLOURS[draw[i] % 8]} {_THINGS[draw[i + 1] % 8]} stands beside a "
        f"{_COLOURS[draw[i + 2] % 8]} {_THINGS[draw[i + 3] % 8]} in the light."
        for i in range(0, 4 * (1 + draw[15] % 3), 4)
    ]
    return Completion(" ".join(sentences), 12 * len(sentences) + 1, "stop")
