"""However an engine's thread ends, nobody is left waiting for it."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.engine.batching import BatchingEngine
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle
from sharegpt4v.models.adapter import Adapter


class _Engine(BatchingEngine):
    """Runs up to four requests; a step fails while `poison` is among them, and taking them out may, too."""

    def __init__(self, adapter: Adapter, poison: str, stuck: bool = False) -> None:
        super().__init__(adapter, slots=4, context=64)
        self.groups: list[list[str]] = []
        self._poison, self._stuck = poison, stuck
        self._handles: list[Handle] = []

    def begin(self) -> None:
        self._start("test-engine")

    def _step(self) -> None:
        self._receive()
        fresh = min(4, len(self._waiting))
        self._handles = (
            self._suspects.popleft() if self._suspects else [self._waiting.popleft() for _ in range(fresh)]
        )
        self.groups.append([handle.request.id for handle in self._handles])
        if self._poison in self.groups[-1]:
            self._suspect(RuntimeError("a bad step"))
            return
        for handle in self._handles:
            handle.fail(EngineError("answered"))
        self._handles = []

    def _busy(self) -> int:
        return len(self._handles)

    def _running(self) -> Iterable[Handle]:
        return self._handles

    def _stop_running(self) -> None:
        self._handles = []
        if self._stuck:
            raise RuntimeError("cannot take them out")


def _request(key: str) -> Request:
    return Request(key, (Turn("user", "?"),))


def test_suspects_are_tried_by_halves_until_the_one_at_fault_is_alone(adapter: Adapter) -> None:
    engine = _Engine(adapter, "c")
    handles = {key: engine.submit(_request(key)) for key in "abcd"}
    engine.begin()
    for key, handle in handles.items():
        with pytest.raises(EngineError, match="RuntimeError: a bad step" if key == "c" else "answered"):
            handle.result(10)
    engine.close()
    assert engine.groups[:5] == [list("abcd"), ["a", "b"], ["c", "d"], ["c"], ["d"]]


def test_nobody_waits_for_ever_when_a_failed_step_cannot_be_taken_apart(adapter: Adapter) -> None:
    engine = _Engine(adapter, "c", stuck=True)
    handles = [engine.submit(_request(key)) for key in "abcdef"]
    engine.begin()
    for handle in handles:
        with pytest.raises(EngineClosed, match="the engine ended: RuntimeError: cannot take them out"):
            handle.result(10)
    with pytest.raises(EngineClosed):
        engine.submit(_request("g"))


def test_a_fake_answer_that_cannot_be_made_fails_its_request_alone() -> None:
    engine = FakeEngine(FakeOptions())
    broken = Request("x", (Turn("user", "?", (Path("no pixels"),)),))  # type: ignore[arg-type]
    handles = [engine.submit(broken), engine.submit(_request("y"))]
    with pytest.raises(EngineError, match="AttributeError"):
        handles[0].result(10)
    assert handles[1].result(10).text
    engine.close()
