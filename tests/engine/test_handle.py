"""A handle serves threads that wait, loops that stream, and coroutines that await."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

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


# Readers that leave


def _in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_leaving_the_block_cancels_what_is_not_done() -> None:
    left, answered = _handle(), _handle()

    async def run() -> None:
        async with left as same:
            assert same is left
        async with answered:
            answered.finish(ANSWER)

    asyncio.run(run())
    assert left.cancelled and not answered.cancelled


def test_an_error_in_the_block_cancels_and_is_raised() -> None:
    handle = _handle()

    async def run() -> None:
        async with handle:
            raise ConnectionResetError("the client left")

    with pytest.raises(ConnectionResetError):
        asyncio.run(run())
    assert handle.cancelled


def test_a_cancelled_task_cancels_its_request() -> None:
    awaited, streamed = _handle(), _handle()
    streamed.push("a ")

    async def read() -> list[str]:
        return [piece async for piece in streamed]

    async def run() -> None:
        tasks = [asyncio.create_task(_await(awaited)), asyncio.create_task(read())]
        await asyncio.sleep(0.01)
        assert not awaited.cancelled and not streamed.cancelled
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert awaited.cancelled and streamed.cancelled


def test_a_break_out_of_an_iteration_cancels() -> None:
    handle, in_loop = _handle(), _handle()
    for each in (handle, in_loop):
        each.push("a ")
    for _ in handle:
        break
    assert handle.cancelled

    async def run() -> None:
        async for _ in in_loop:
            break
        await asyncio.sleep(0.01)  # the loop closes an abandoned generator at its next turn

    asyncio.run(run())
    assert in_loop.cancelled


def test_a_reader_that_leaves_does_not_cancel_for_the_others() -> None:
    handle = _handle()
    handle.push("a ")
    results: list[Completion] = []
    waiting = _in_thread(lambda: results.append(handle.result(5)))
    while not handle._readers:
        time.sleep(0.001)
    for _ in handle:
        break
    assert not handle.cancelled
    handle.finish(ANSWER)
    waiting.join(5)
    assert results == [ANSWER]


def test_a_result_that_is_late_leaves_the_request_running() -> None:
    handle = _handle()
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    assert not handle.cancelled


def test_readers_of_an_ended_request_cancel_nothing() -> None:
    handle = _handle()
    handle.push("a ")
    handle.push("cat")
    handle.finish(ANSWER)
    for _ in handle:
        break
    assert list(handle) == ["a ", "cat"] and not handle.cancelled


def test_no_waiter_is_kept_once_it_left() -> None:
    """A handle that a server polls would otherwise wake every loop and task that ever waited for it."""
    handle = _handle()
    handle.push("a ")

    async def run() -> None:
        for _ in range(50):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_await(handle), 0.001)
        async for _ in handle:
            break
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert handle._waiters == [] and handle._readers == 0


def test_a_piece_that_comes_while_the_pieces_are_looked_at_is_not_lost() -> None:
    """The reader saw no piece, then that the request had ended, and left without the one between."""

    async def read(chunks: bool) -> str:
        handle = Handle(Request("a", ()))

        class Looked(list[str]):
            def __getitem__(self, key: Any) -> Any:
                seen = super().__getitem__(key)
                if not self and not handle.done():
                    handle.push("last")
                    handle.finish(Completion("last", 1, "stop"))
                return seen

        handle._pieces = Looked()
        return "".join([piece async for piece in (handle.chunks() if chunks else handle)])

    assert [asyncio.run(read(chunks)) for chunks in (False, True)] == ["last", "last"]


def test_chunks_join_the_pieces_that_are_there() -> None:
    async def read() -> list[str]:
        handle = Handle(Request("a", ()))
        for piece in "abc":
            handle.push(piece)
        handle.finish(Completion("abc", 3, "stop"))
        return [chunk async for chunk in handle.chunks()]

    assert asyncio.run(read()) == ["abc"]
