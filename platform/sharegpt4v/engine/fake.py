"""A deterministic engine without a model: given speed, given faults. For benchmarks and fault tests."""

import hashlib
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from sharegpt4v.dialogue import Completion, Request
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle
from sharegpt4v.engine.threaded import UNFINISHED, ThreadedEngine, withdrawn
from sharegpt4v.errors import UserError

FAULTS = ("kill", "hang", "error", "refusal", "empty", "loop", "length", "once")
_COLOURS = ("red", "green", "blue", "yellow", "grey", "brown", "white", "black")
_THINGS = ("square", "tree", "house", "cat", "boat", "table", "hill", "cup")


@dataclass(frozen=True, slots=True)
class FakeOptions:
    """image_size in pixels. seconds_per_request: time one request takes, alone or in company.

    faults: fault name -> regular expression over request ids. kill ends the process with SIGKILL, hang
    never answers, error fails the request, once fails only the first attempt's gate, the others
    answer with a text that the gate must catch.
    """

    image_size: int = 96
    capacity: int = 1024
    seconds_per_request: float = 0.0
    faults: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(FAULTS)
        if unknown:
            raise UserError(f"unknown fault {sorted(unknown)[0]!r}; known: {', '.join(FAULTS)}")


class FakeEngine(ThreadedEngine):
    """Answers from a hash of the picture, so that equal pixels always get equal captions."""

    def __init__(self, options: FakeOptions) -> None:
        super().__init__()
        self.options = options
        self.model = "fake@0"
        self.image_size = options.image_size
        self.capacity = options.capacity
        self._faults = {name: re.compile(pattern) for name, pattern in options.faults.items()}
        self._start("fake-engine")

    def _step(self) -> None:
        handle = self._queue.take()
        if handle is None:
            return
        try:
            if not withdrawn(handle, 0):
                self._answer(handle)
        except Exception as error:
            self._fail(handle, error)

    def _answer(self, handle: Handle) -> None:
        request = handle.request
        if self.options.seconds_per_request:
            time.sleep(self.options.seconds_per_request)
        if withdrawn(handle, 0):
            return
        fault = self._fault(request)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            self._queue.wait_closed()
            handle.fail(EngineClosed(UNFINISHED))
            return
        if fault == "error":
            raise EngineError("the fake engine was told to fail this request")
        completion = _faulty(fault) or _describe(request)
        handle.push(completion.text)
        handle.finish(completion)
        self._count(requests=1, new_tokens=completion.tokens)

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
    """A caption of one to three sentences drawn from the pixels and the sampling seed."""
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
