"""A handle serves threads that wait, loops that stream, and coroutines that await."""

import asyncio
import threading

import pytest

from sharegpt4v.dialogue import Completion, Request, Turn, sampling_seed
from sharegpt4v.engine.handle import EngineError, Handle

ANSWER = Completion("a cat", 3, "stop")


def _handle() -> Handle:
    return Handle(Request("one", (Turn("user", "?"),)))


def test_every_waiting_thread_gets_the_result() -> None:
    handle = _handle()
    results: list[Completion] = []
    threads = [threading.Thread(target=lambda: results.append(handle.result(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    handle.finish(ANSWER)
    for thread in threads:
        thread.join(5)
    assert results == [ANSWER] * 4
    assert handle.result(0) == ANSWER


def test_a_result_that_is_late_times_out_and_may_still_come() -> None:
    handle = _handle()
    with pytest.raises(TimeoutError, match="'one'"):
        handle.result(0.01)
    assert not handle.done()
    handle.finish(ANSWER)
    assert handle.result(0) == ANSWER


def test_a_failed_request_raises_everywhere() -> None:
    handle = _handle()
    handle.push("a ")
    handle.fail(EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        handle.result()
    pieces = iter(handle)
    assert next(pieces) == "a "
    with pytest.raises(EngineError, match="broken"):
        next(pieces)


def test_pieces_stream_to_a_coroutine_while_they_come() -> None:
    handle = _handle()

    async def read() -> list[str]:
        return [piece async for piece in handle]

    def speak() -> None:
        for piece in ("a ", "cat"):
            handle.push(piece)
        handle.finish(ANSWER)

    threading.Timer(0.05, speak).start()
    assert asyncio.run(read()) == ["a ", "cat"]


def test_awaiting_works_before_and_after_the_end() -> None:
    handle = _handle()

    async def both() -> tuple[Completion, Completion]:
        threading.Timer(0.05, handle.finish, [ANSWER]).start()
        return await handle, await handle

    assert asyncio.run(both()) == (ANSWER, ANSWER)


def test_a_cancelled_waiter_does_not_break_the_others() -> None:
    handle = _handle()

    async def run() -> Completion:
        async def wait() -> Completion:
            return await handle

        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        first.cancel()
        handle.finish(ANSWER)
        return await second

    assert asyncio.run(run()) == ANSWER


def test_a_closed_loop_does_not_hurt_the_engine() -> None:
    handle = _handle()

    async def wait() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_await(handle), 0.01)

    asyncio.run(wait())
    handle.push("a ")
    handle.finish(ANSWER)
    assert handle.result(0) == ANSWER


async def _await(handle: Handle) -> Completion:
    return await handle


def test_the_first_end_counts() -> None:
    handle = _handle()
    handle.finish(ANSWER)
    handle.fail(EngineError("too late"))
    assert handle.result(0) == ANSWER


def test_many_streams_wait_without_a_thread_each() -> None:
    handles = [_handle() for _ in range(64)]

    async def read(handle: Handle) -> str:
        return "".join([piece async for piece in handle])

    async def run() -> list[str]:
        before = threading.active_count()
        readers = [asyncio.create_task(read(handle)) for handle in handles]
        await asyncio.sleep(0.05)
        assert threading.active_count() < before + 8
        for handle in reversed(handles):
            handle.push("cat")
            handle.finish(ANSWER)
        return await asyncio.gather(*readers)

    assert asyncio.run(run()) == ["cat"] * 64


def test_the_seed_depends_on_id_and_attempt_alone() -> None:
    assert sampling_seed("a", 0) == sampling_seed("a", 0)
    assert len({sampling_seed(key, attempt) for key in ("a", "b", "\ud800") for attempt in (0, 1)}) == 6
