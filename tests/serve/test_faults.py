"""Engines that fail, hang and close, and clients that leave."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from serve.api import Api
from serve.limits import Limits
from tests.serve.server import data_url, fake_models, png, serving, user

BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("What is this?", data_url(png()))]}
CHAT = "/v1/chat/completions"


def _post(address: str, name: str, **more: Any) -> httpx.Response:
    return httpx.post(address + CHAT, json=BODY | more, headers={"x-request-id": name}, timeout=20)


def until(holds: Callable[[], bool], seconds: float) -> float:
    """Returns the seconds until something holds."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds
        time.sleep(0.005)
    return time.monotonic() - start


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_says_nothing_of_why_and_leaves_the_others(stream: bool) -> None:
    with fake_models(error="bad") as models, serving(Api(models)) as address:
        bad, good = _post(address, "bad-1", stream=stream), _post(address, "good-1", stream=stream)
        assert "fake engine" not in bad.text and "internal_error" in bad.text
        assert (bad.status_code, good.status_code) == (200 if stream else 500, 200)
        if stream:
            with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
                with pytest.raises(openai.APIError):
                    list(
                        client.chat.completions.create(
                            **BODY, stream=True, extra_headers={"x-request-id": "bad"}
                        )
                    )


def test_a_hung_engine_is_not_ready_and_its_requests_end_at_their_deadline() -> None:
    with fake_models(hang="hang") as models, serving(Api(models, Limits(request_seconds=0.5))) as address:
        for model in models.values():
            model._hang_seconds = 0.2
        assert httpx.get(f"{address}/readyz").status_code == 200
        start = time.monotonic()
        answer = _post(address, "hang")
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert time.monotonic() - start < 2.5
        threading.Thread(target=_post, args=(address, "next"), daemon=True).start()
        until(lambda: httpx.get(f"{address}/readyz").status_code == 503, 5)
        assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_lone_request_that_hangs_before_its_first_token_makes_the_engine_not_ready() -> None:
    """It is in no slot and no queue yet: the engine's own counts show nothing to do."""
    with fake_models(hang="hang") as models, serving(Api(models, Limits(request_seconds=5))) as address:
        models["fake-chat"]._hang_seconds = 0.3
        threading.Thread(target=_post, args=(address, "hang"), daemon=True).start()
        until(lambda: httpx.get(f"{address}/readyz").status_code == 503, 4)


def test_a_closed_engine_is_unavailable() -> None:
    with fake_models() as models, serving(Api(models)) as address:
        models["fake-chat"].engine.close()
        answer = _post(address, "late")
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_second(stream: bool) -> None:
    with fake_models(seconds=60) as models, serving(Api(models)) as address:
        engine = models["fake-chat"].engine

        async def leave() -> None:
            async with httpx.AsyncClient(timeout=20) as client:
                async with asyncio.timeout(1):
                    await client.post(address + CHAT, json=BODY | {"stream": stream})

        with pytest.raises(TimeoutError):
            asyncio.run(leave())
        assert until(lambda: engine.stats().running == 0, 5) < 1
        assert engine.stats().cancelled == 1


def test_a_caption_batch_whose_client_leaves_frees_all_its_slots() -> None:
    with fake_models(seconds=60) as models, serving(Api(models)) as address:
        engine = models["fake-chat"].engine
        with pytest.raises(httpx.ReadTimeout):
            images = [data_url(png(n)) for n in range(4)]
            httpx.post(f"{address}/v1/captions", json={"images": images}, timeout=1)
        assert until(lambda: engine.stats().running == 0, 5) < 1


def test_a_stream_begins_before_its_answer_is_finished() -> None:
    with fake_models(seconds=2) as models, serving(Api(models)) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x") as client:
            start, times = time.monotonic(), []
            for chunk in client.chat.completions.create(**BODY, stream=True):
                if chunk.choices[0].delta.content:
                    times.append(time.monotonic() - start)
        assert times[0] < 0.5 and times[-1] > 1.5 and len(times) > 10


def test_draining_refuses_new_requests_and_finishes_those_in_progress() -> None:
    with fake_models(seconds=1.5) as models:
        api = Api(models)
        with serving(api) as address:
            answers: list[httpx.Response] = []
            first = threading.Thread(target=lambda: answers.append(_post(address, "first")))
            first.start()
            until(lambda: api.admission.in_flight == 1, 5)
            drained = threading.Thread(target=lambda: asyncio.run(api.drain(20)))
            drained.start()
            until(lambda: api.admission.draining, 5)
            late = _post(address, "late")
            assert late.status_code == 503 and late.headers["retry-after"]
            assert httpx.get(f"{address}/readyz").status_code == 503
            drained.join()
            first.join()
            assert answers[0].status_code == 200
