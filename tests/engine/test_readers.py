"""Readers that leave a running torch engine: their slots are free for others at once."""

import asyncio
import time
from contextlib import closing

from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from tests.engine.requests import make_request

SLOTS = 8


def _long(engine: TorchEngine, adapter: Adapter) -> list[Handle]:
    requests = [make_request(adapter, n, max_new_tokens=900, min_new_tokens=900) for n in range(SLOTS)]
    return [engine.submit(request) for request in requests]


def _until_free(engine: TorchEngine) -> float:
    """Returns the seconds until no slot is busy."""
    start = time.monotonic()
    while (now := engine.stats()).running or now.queued:
        assert time.monotonic() - start < 5, now
        time.sleep(0.005)
    return time.monotonic() - start


def test_cancelled_tasks_and_left_blocks_free_their_slots(adapter: Adapter) -> None:
    """All slots were still busy a second later, and until the last of 900 tokens."""

    async def leave(handles: list[Handle]) -> None:
        async def use(handle: Handle) -> None:
            async with handle:
                await handle

        tasks = [asyncio.create_task(use(handle)) for handle in handles]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    with closing(TorchEngine(adapter, "toy@0", capacity=SLOTS)) as engine:
        handles = _long(engine, adapter)
        asyncio.run(leave(handles))
        assert _until_free(engine) < 0.5
        assert {handle.result(1).finish_reason for handle in handles} == {"cancelled"}
        assert engine.submit(make_request(adapter, 99)).result(30).finish_reason != "cancelled"
