"""Keys, rates and admission: who is let in, and what the others hear."""

import asyncio
import json
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from serve import keys
from serve.api import Api
from serve.board import Board, Report
from serve.errors import ApiError
from serve.limits import Admission, Limits
from serve.logs import JsonLines
from serve.model import Snapshot
from sharegpt4v.engine.stats import EngineStats, Latencies, Seconds
from sharegpt4v.errors import UserError
from tests.serve.server import data_url, fake_models, png, serving, user

BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("What is this?", data_url(png()))]}
CHAT = "/v1/chat/completions"


@pytest.fixture
def key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Path]:
    """A key and the file that has its hash, among others."""
    file = tmp_path / "keys.txt"
    lines = []
    for name in ("alice", "bob"):
        assert keys.main([name]) == 0
        said = capsys.readouterr()
        lines.append(said.out)
    file.write_text("# who may\n\n" + "".join(lines))
    return said.err.split()[-1], file


def test_a_key_file_has_names_and_hashes_and_no_key(key: tuple[str, Path]) -> None:
    bob, file = key
    known = keys.read_keys(file)
    assert sorted(known.values()) == ["alice", "bob"] and bob not in file.read_text()
    assert keys.name_of(f"Bearer {bob}", known) == "bob"
    for wrong in ("", bob, "Bearer", f"Basic {bob}", f"Bearer {bob}x", f"Bearer {next(iter(known))}"):
        assert keys.name_of(wrong, known) is None


def test_a_wrong_line_is_named_by_its_number_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    one = f"a sha256:{'0' * 64}\n"
    for text, said in (
        *(("sk-secret", "line 1"), ("", "no key"), ("a sha256:12", "line 1")),
        (one + one.replace("a", "b", 1), "line 2 of .* has the key of a under another name"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said) as raised:
            keys.read_keys(file)
        assert "secret" not in str(raised.value) and raised.value.field == "api_keys"
    with pytest.raises(UserError, match="cannot read"):
        keys.read_keys(tmp_path / "none")
    file.write_text("\ufeff" + one + one)
    assert list(keys.read_keys(file).values()) == ["a"]


def test_every_route_but_health_and_metrics_wants_a_key(key: tuple[str, Path]) -> None:
    bob, file = key
    with fake_models() as models, serving(Api(models, keys=keys.read_keys(file))) as address:
        for path in (
            "/healthz",
            "/readyz",
            "/metrics",
            "/docs",
            "/docs/static/swagger-ui.css",
            "/openapi.json",
        ):
            assert httpx.get(address + path).status_code == 200
        for method, path in (
            *(("GET", "/v1/models"), ("GET", "/docs2"), ("GET", "/nowhere")),
            *(("POST", CHAT), ("POST", "/v1/captions"), ("GET", "//metrics"), ("GET", "/metrics/")),
        ):
            assert httpx.request(method, address + path).status_code == 401, path
        with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(**BODY)
        with openai.OpenAI(base_url=f"{address}/v1", api_key=bob, max_retries=0) as client:
            assert client.chat.completions.create(**BODY).choices


def test_a_refusal_comes_before_the_body() -> None:
    """The client has sent its head alone."""
    with fake_models() as models:
        api = Api(models, Limits(in_flight=0), keys={})
        with serving(api) as address:
            there = urlsplit(address)
            with socket.create_connection((there.hostname or "", there.port or 0), timeout=5) as connection:
                connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n".encode())
                said = connection.recv(2000).decode()
    assert " 429 " in said and re.search(r"retry-after: \d", said)


def test_a_body_that_does_not_come_ends_in_408() -> None:
    with fake_models() as models, serving(Api(models, Limits(body_seconds=0.3))) as address:
        there = urlsplit(address)
        with socket.create_connection((there.hostname or "", there.port or 0), timeout=5) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n{{".encode())
            assert b" 408 " in connection.recv(2000)


def _refusal(admission: Admission, key: str) -> ApiError:
    with pytest.raises(ApiError) as raised:
        admission.enter(key)
    return raised.value


def test_a_key_has_its_own_rate_and_gets_it_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    admission = Admission(Limits(per_minute=2))
    for _ in range(2):
        admission.leave(admission.enter("alice"))
    error = _refusal(admission, "alice")
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.headers() == {"retry-after": "30"}
    admission.enter("bob")
    now += 30
    admission.enter("alice")


def test_a_key_has_its_own_share_of_what_runs_at_once() -> None:
    admission = Admission(Limits(per_key=1, in_flight=2))
    tickets = [admission.enter("alice"), admission.enter("bob")]
    assert _refusal(admission, "carol").code == "overloaded"
    admission.leave(tickets[1])
    assert _refusal(admission, "alice").code == "concurrency_limit_exceeded"
    admission.leave(tickets[0])
    admission.leave(admission.enter("alice"))
    assert admission.in_flight == 0


def test_the_board_gives_back_what_a_lost_replica_held(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stats, latencies = EngineStats(), Latencies(Seconds(), Seconds())
    reports = [Report(Snapshot("m", name, stats, latencies)) for name in ("lost", "other")]

    async def run() -> None:
        nonlocal now
        board = Board(Limits(per_key=1))
        for report in reports:
            await board.report(report)
        assert isinstance(await board.admit("lost", "alice"), int)
        refused = await board.admit("other", "alice")
        assert isinstance(refused, ApiError) and refused.code == "concurrency_limit_exceeded"
        now += 20
        await board.report(reports[1])
        number = await board.admit("other", "alice")
        assert isinstance(number, int)
        await board.leave("other", number)
        assert isinstance(await board.admit("other", "alice"), int)
        assert [report.snapshot.replica for report in await board.reports()] == ["other"]

    asyncio.run(run())


def test_without_keys_only_this_machine_is_answered_whatever_the_port_is_open_to() -> None:
    with fake_models() as models:
        app = Api(models).app()

        async def ask(server: tuple[str, int]) -> int:
            transport = _Served(app, server)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                return (await client.get("/v1/models")).status_code

        assert [asyncio.run(ask((host, 8000))) for host in ("127.0.0.1", "::1", "10.1.2.3")] == [
            200,
            200,
            403,
        ]


class _Served(httpx.ASGITransport):
    """Calls an app as a server that listens on a given address does."""

    def __init__(self, app: Any, server: tuple[str, int]) -> None:
        async def listening(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "server": server}, receive, send)

        super().__init__(listening)


def test_overload_is_refused_at_once_and_the_admitted_are_answered() -> None:
    with fake_models(seconds=1.0) as models, serving(Api(models, Limits(in_flight=4))) as address:

        async def ask(client: httpx.AsyncClient) -> tuple[int, float]:
            start = time.monotonic()
            answer = await client.post(address + CHAT, json=BODY)
            return answer.status_code, time.monotonic() - start

        async def ask_all() -> list[tuple[int, float]]:
            async with httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=40)) as client:
                return await asyncio.gather(*(ask(client) for _ in range(40)))

        answers = asyncio.run(ask_all())
        assert sorted({status for status, _ in answers}) == [200, 429]
        assert sum(status == 200 for status, _ in answers) == 4
        assert max(seconds for status, seconds in answers if status == 429) < 1.0


def test_the_log_has_a_line_of_json_a_request_without_its_content(
    caplog: pytest.LogCaptureFixture, key: tuple[str, Path]
) -> None:
    bob, file = key
    logging.getLogger("serve").propagate = True
    with fake_models(error="bad") as models, serving(Api(models, keys=keys.read_keys(file))) as address:
        with caplog.at_level(logging.INFO, "serve"):
            for name in ("good-1", "bad-1"):
                headers = {"authorization": f"Bearer {bob}", "x-request-id": name}
                httpx.post(address + CHAT, json=BODY, headers=headers, timeout=20)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    requests = {line["request_id"]: line for line in lines if line["message"] == "request"}
    assert requests["good-1"]["key"] == "bob" and requests["good-1"]["status"] == 200
    assert requests["good-1"]["completion_tokens"] > 12 and requests["good-1"]["model"] == "fake-chat"
    assert requests["bad-1"]["code"] == "internal_error"
    failed = [line for line in lines if "traceback" in line]
    assert [line["request_id"] for line in failed] == ["bad-1"] and "fake engine" in failed[0]["traceback"]
    whole = json.dumps(lines)
    assert bob not in whole and "What is this" not in whole and "base64" not in whole


def test_texts_are_in_the_log_where_that_is_asked_for_and_images_never(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("serve").propagate = True
    with fake_models() as models, serving(Api(models, logs_texts=True)) as address:
        with caplog.at_level(logging.INFO, "serve"):
            answers = [httpx.post(address + CHAT, json=BODY, timeout=20)]
            answers.append(httpx.post(address + CHAT, json=BODY | {"stream": True}, timeout=20))
            images = {"images": [data_url(png())] * 2, "prompt": "Caption."}
            captions = httpx.post(f"{address}/v1/captions", json=images, timeout=20).json()["data"]
    first, second, third = (vars(record) for record in caplog.records if record.message == "request")
    assert first["messages"] == second["messages"] == [{"role": "user", "content": "What is this?"}]
    assert first["answer"] == answers[0].json()["choices"][0]["message"]["content"] and second["answer"]
    assert third["prompt"] == "Caption." and third["captions"] == [row["caption"] for row in captions]
    assert "base64" not in str(caplog.records)
