"""Bodies that no client of OpenAI's would send."""

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = "/v1/chat/completions"
DEEP = b'{"model": "fake-chat", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"{}", DEEP),
        b'{"model": "fake-chat", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "fake-chat", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "fake-chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}',
        b'{"model": "fake-chat", "messages": [{"role": "user", "content": "a"}], "seed": '
        + b"9" * 5000
        + b"}",
    ],
    ids=lambda body: repr(body[:20]) + str(len(body)),
)
@pytest.mark.parametrize("path", [CHAT, "/v1/captions"])
def test_bodies_that_are_no_request_are_refused(path: str, body: bytes, fake_address: str) -> None:
    answer = httpx.post(fake_address + path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and len(answer.content) < 500


@pytest.mark.parametrize("path", [CHAT, "/v1/captions"])
def test_a_body_of_50_mb_is_refused_from_its_header(path: str, fake_address: str) -> None:
    there = urlsplit(fake_address)
    with socket.create_connection((there.hostname or "", there.port or 0), timeout=10) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 50000000\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)


def test_a_body_without_a_length_is_cut_at_the_limit(fake_address: str) -> None:
    parts = (b" " * 100_000 for _ in range(200))
    answer = httpx.post(fake_address + CHAT, content=parts)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_the_error_names_the_field_and_does_not_repeat_what_was_sent(fake_address: str) -> None:
    secret = "sk-" + "z" * 40
    body = {"model": "fake-chat", "messages": [{"role": secret, "content": secret}], "temperature": secret}
    answer = httpx.post(fake_address + CHAT, json=body)
    assert answer.status_code == 400 and "z" * 10 not in answer.text


def test_other_methods_and_paths_have_errors_of_the_same_shape(fake_address: str) -> None:
    for method, path, status in (
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/etc/passwd", 404),
    ):
        answer = httpx.request(method, fake_address + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_text_of_a_megabyte_is_refused_and_not_the_servers_fault(fake_address: str) -> None:
    body = {"model": "fake-chat", "messages": [{"role": "user", "content": "a b" * 330_000}]}
    answer = httpx.post(fake_address + CHAT, content=json.dumps(body), timeout=30)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_answers_carry_the_clients_request_id_if_it_is_a_plain_one(fake_address: str) -> None:
    own = httpx.get(fake_address + "/v1/models", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    other = httpx.get(fake_address + "/v1/models", headers={"x-request-id": "a b\tc"})
    assert other.headers["x-request-id"].startswith("req-")
