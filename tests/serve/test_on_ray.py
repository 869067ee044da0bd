"""The server on Ray Serve: two replicas a model behind one address, killed, hung and drained under load."""

import asyncio
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.server import data_url, png, user
from tests.serve.test_app import running

pytestmark = pytest.mark.workers

BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("What is this?", data_url(png()))]}
CHAT = "/v1/chat/completions"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _replicas(of: int, deployment: str) -> list[int]:
    """Process ids of a deployment's replicas below the process `of`."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.M)
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
        if parent:
            children.setdefault(int(parent[1]), []).append(int(folder.name))
    found, look = [], [of]
    while look:
        below = children.get(look.pop(), [])
        look += below
        found += [pid for pid in below if f"ServeReplica:sharegpt4v:{deployment}" in names.get(pid, "")]
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, str]]:
    arguments = ("serve", "--engine", "fake", "--port", str(free_port()), "--replicas", "2")
    slow: tuple[str, ...] = ("--fake.seconds-per-request", "1.0", "--slots", "32", "--limits.per-key", "40")
    slow += ("--hang-seconds", "3", "--fake.faults", '{"hang": "^hang"}')
    with running(*arguments, *slow, wait=120) as (process, address):
        yield process, address


@pytest.mark.timeout(200)
def test_the_official_client_works_and_captions_come_from_the_other_deployment(
    server: tuple[Any, str],
) -> None:
    address = server[1]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=30) as client:
        assert [model.id for model in client.models.list()] == ["fake-captioner", "fake-chat"]
        whole = client.chat.completions.create(**BODY)
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**BODY, stream=True)
        ]
        assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 10
        other = BODY | {"model": "fake-captioner"}
        chunks = list(client.chat.completions.create(**other, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(pieces)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**BODY, max_tokens=10**6)
    answer = httpx.post(
        f"{address}/v1/captions", json={"images": [data_url(png(n)) for n in range(5)]}, timeout=30
    )
    assert len({row["caption"] for row in answer.json()["data"]}) == 5
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_metrics_have_every_replica(server: tuple[Any, str]) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        page = httpx.get(f"{server[1]}/metrics").text
        found = set(re.findall(r'engine_slots{model="([\w-]+)",replica="(\w+)"} 32', page))
        if len(found) == 4:
            break
        time.sleep(0.5)
    assert sorted(model for model, _ in found) == ["fake-captioner"] * 2 + ["fake-chat"] * 2
    assert page.count("# TYPE sharegpt4v_http_requests_total counter") == 1


def test_a_keys_requests_are_counted_over_both_replicas(server: tuple[Any, str]) -> None:
    """Each replica alone would let 128 in, and 40 of a key if it counted by itself."""

    async def ask_all() -> list[int]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=30, limits=limits) as client:
            sent = [client.post(server[1] + CHAT, json=BODY) for _ in range(70)]
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    codes = asyncio.run(ask_all())
    assert codes.count(200) == 40 and codes.count(429) == 30


@pytest.mark.timeout(200)
def test_a_killed_replica_takes_only_its_own_requests_along_and_comes_back(server: tuple[Any, str]) -> None:
    process, address = server
    before = _replicas(process.pid, "chat")
    assert len(before) == 2
    outcomes: list[str] = []
    stop = threading.Event()

    def ask_on() -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=30) as client:
            while not stop.is_set():
                try:
                    chunks = list(client.chat.completions.create(**BODY, stream=True))
                    outcomes.append(chunks[-1].choices[0].finish_reason or "cut")
                except (openai.APIError, httpx.HTTPError) as error:
                    outcomes.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(before[0], signal.SIGKILL)
    start = time.monotonic()
    while len(set(_replicas(process.pid, "chat")) - {before[0]}) < 2:
        assert time.monotonic() - start < 30
        time.sleep(0.2)
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join(30)
    failed = [outcome for outcome in outcomes if outcome != "stop"]
    assert len(failed) <= 8 and len(outcomes) > 30, failed
    assert "cut" not in failed, "an answer that was cut must not look like a whole one"


@pytest.mark.timeout(200)
def test_a_hung_replica_is_replaced_while_the_other_one_answers(server: tuple[Any, str]) -> None:
    process, address = server
    before = set(_replicas(process.pid, "chat"))
    hung: list[int | str] = []

    def hang() -> None:
        try:
            hung.append(
                httpx.post(
                    address + CHAT, json=BODY, headers={"x-request-id": "hang"}, timeout=20
                ).status_code
            )
        except httpx.HTTPError as error:
            hung.append(type(error).__name__)

    asked = threading.Thread(target=hang)
    asked.start()
    time.sleep(1)
    codes: list[int] = []
    start = time.monotonic()
    while not set(_replicas(process.pid, "chat")) - before:
        assert time.monotonic() - start < 60, "no other replica was started"
        with suppress(httpx.TimeoutException):
            codes.append(httpx.post(address + CHAT, json=BODY, timeout=3).status_code)
    assert codes.count(200) >= 2 and set(codes) <= {200, 503}
    asked.join(40)
    assert hung and hung[0] != 200


@pytest.mark.timeout(200)
def test_sigterm_cuts_no_answer(server: tuple[Any, str]) -> None:
    """The last test of this file: it ends the server."""
    process, address = server
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(address + CHAT, json=BODY | {"stream": True}, timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert [answer.text[-14:] for answer in answers] == ["data: [DONE]\n\n"] * 10
    assert process.wait(100) == 0
