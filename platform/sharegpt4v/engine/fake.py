"""A deterministic engine without a model, with set speed and faults, for benchmarks and for tests of servers.

It behaves as a real one: requests run beside each other up to its capacity, grow token by token, stream, stop
at their limits and stop strings, and are cancelled, expire and are closed between two steps.
"""

import hashlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from sharegpt4v.dialogue import Completion, FinishReason, Request, SamplingParams, Turn
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.scheduled import ScheduledEngine, refuse_likelihoods
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.worker import run_until_closed, start_thread
from sharegpt4v.errors import UserError

FAULTS = ("kill", "hang", "error", "refusal", "empty", "loop", "length", "once")
_COLOURS = ("red", "green", "blue", "yellow", "grey", "brown", "white", "black")
_STEP_SECONDS = 0.005
"""Longest wait between two steps, which see new and cancelled requests; a real engine's are as long."""

_CONTEXT, _IMAGE_TOKENS = 4096, 576
"""Those of ShareGPT4V-7B: servers compute with them."""

_TOKEN = re.compile(r"\s*(?:[\w'-]+|\S)|\s+$")
"""A word with the white space before it, or one mark."""

_THINGS = ("square", "tree", "house", "cat", "boat", "table", "hill", "cup")


@dataclass(frozen=True, slots=True)
class FakeOptions:
    """image_side in pixels. seconds_per_request: time to generate an answer that is not cut short.

    faults: fault name -> regular expression over request ids. kill ends the process with SIGKILL, hang stops
    the engine for good as a lost device does, error fails the request, once fails only the first attempt's
    gate, the others answer with a text that the gate must reject.
    """

    image_side: int = 96
    requests_at_once: int = 1024
    seconds_per_request: float = 0.0
    faults: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.faults) - set(FAULTS)
        if unknown:
            raise UserError(f"{sorted(unknown)[0]!r} is unknown; known: {', '.join(FAULTS)}", field="faults")


class FakeEngine(ScheduledEngine):
    """Answers from a hash of the images, so that equal pixels get equal captions."""

    def __init__(self, options: FakeOptions) -> None:
        self.options = options
        self.model = "fake@0"
        self.image_size = options.image_side
        self.capacity = options.requests_at_once
        self.context = _CONTEXT
        self._faults = {name: re.compile(pattern) for name, pattern in options.faults.items()}
        self._scheduler: Scheduler[Any] = Scheduler(slots=self.capacity)
        self._answers: dict[int, _Answer] = {}  # those running, by slot
        self._thread = start_thread("fake-engine", lambda: run_until_closed(self._scheduler, self._step))

    def count(self, turns: Sequence[Turn]) -> int:
        """Returns the tokens of a prompt, images included. Raises UserError for roles out of order."""
        return sum(len(_TOKEN.findall(turn.text)) + _IMAGE_TOKENS * len(turn.images) for turn in turns)

    def _step(self) -> None:
        """Begins requests, then gives every running one the tokens that are due."""
        self._scheduler.receive()
        for slot, handle in self._scheduler.admit().items():
            try:
                self._begin(slot, handle)
            except Exception as error:
                self._scheduler.fail(slot, error)
        for slot in list(self._answers):
            self._advance(slot)
        if self._answers:
            time.sleep(min(_STEP_SECONDS, self.options.seconds_per_request))

    def _begin(self, slot: int, handle: Handle) -> None:
        request = handle.request
        refuse_likelihoods(request, "fake")
        fault = self._fault(request)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            self._scheduler.wait_closed()
            return
        if fault == "error":
            raise EngineError("the fake engine fails this request, as its faults say")
        text, reason = _faulty(fault) or (_describe(request), "stop")
        pieces, completion = _cut(text, reason, request.sampling)
        seconds = self.options.seconds_per_request
        pace = seconds / max(1, len(_TOKEN.findall(text))) if seconds else 0.0
        self._answers[slot] = _Answer(handle, pieces, completion, pace)
        self._scheduler.place(slot, self._answers[slot])
        self._scheduler.count(begun=1, ttft_seconds=time.monotonic() - handle.submitted)

    def _advance(self, slot: int) -> None:
        scheduler, answer = self._scheduler, self._answers[slot]
        if not scheduler.drop_withdrawn(slot):
            fresh = answer.due() - len(answer.tokens)
            if fresh:
                scheduler.count(new_tokens=fresh)
            if not answer.handle.request.stream and fresh == len(answer.pieces):
                answer.handle.push(answer.completion.text)  # at once: benchmarks count microseconds
                scheduler.finish(slot, answer.completion)
            for _ in range(fresh):
                if slot in scheduler.running:
                    scheduler.take(slot, len(answer.tokens))
        if slot not in scheduler.running:
            del self._answers[slot]

    def _fault(self, request: Request) -> str | None:
        for name, pattern in self._faults.items():
            if pattern.search(request.id):
                return "refusal" if name == "once" and request.sampling.temperature == 0 else name
        return None


class _Answer:
    """An answer that is known from its beginning and is given out token by token.

    pieces: what each token adds to the text, nothing for an end token. pace: seconds a token.
    """

    def __init__(self, handle: Handle, pieces: list[str], completion: Completion, pace: float) -> None:
        self.handle, self.pieces, self.completion, self._pace = handle, pieces, completion, pace
        self.tokens: list[int] = []
        self._begun = time.monotonic()

    @property
    def position(self) -> int:
        return len(self.tokens) - 1

    def due(self) -> int:
        """Returns how many tokens there should be by now."""
        if not self._pace:
            return len(self.pieces)
        return min(len(self.pieces), int((time.monotonic() - self._begun) / self._pace))

    def take(self, token: int) -> Completion | None:
        """Appends a token and pushes its text if it is streamed. Returns the answer once it is complete."""
        stream = self.handle.request.stream
        self.tokens.append(token)
        if stream:
            self.handle.push(self.pieces[token])
        if len(self.tokens) < len(self.pieces):
            return None
        if not stream:
            self.handle.push(self.completion.text)
        return self.completion


def _cut(text: str, reason: FinishReason, sampling: SamplingParams) -> tuple[list[str], Completion]:
    """Cuts a text at a request's stop strings and length; returns a piece for each token, and the answer."""
    tokens = _TOKEN.findall(text)
    found = [(at, stop) for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if found:
        at, stop = min(found)
        # The token that completes the stop string is generated, too, and shows what precedes that.
        ends = list(accumulate(map(len, tokens)))
        tokens = tokens[: 1 + next(n for n, end in enumerate(ends) if end >= at + len(stop))]
        text, reason = text[:at], "stop"
    elif reason == "stop":
        tokens.append("")  # the end token
    if len(tokens) > sampling.max_new_tokens:
        tokens, reason = tokens[: sampling.max_new_tokens], "length"
        text = text[: sum(map(len, tokens))]
    text = text.rstrip()
    starts = [0, *accumulate(map(len, tokens))]
    pieces = [text[start : start + len(token)] for start, token in zip(starts, tokens, strict=False)]
    return pieces, Completion(text, len(pieces), reason)


def _faulty(fault: str | None) -> tuple[str, FinishReason] | None:
    if fault == "refusal":
        return "I'm sorry, but I cannot help with this image.", "stop"
    if fault == "empty":
        return "", "stop"
    if fault == "loop":
        return "A cat sits on the mat. " * 40, "length"
    if fault == "length":
        return "The picture shows a long street that goes on past the houses and", "length"
    return None


def _describe(request: Request) -> str:
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
    return " ".join(sentences)
