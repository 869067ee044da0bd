"""Connections that send nothing, by the thousand."""

import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from serve import one_process
from tests.serve.test_app import BODY, FAKE, running

OPEN = 1_000


def _seconds(client: httpx.Client, chat: str) -> float:
    start = time.perf_counter()
    assert client.post(chat, json=BODY).status_code == 200
    return time.perf_counter() - start


def test_a_thousand_idle_connections_do_no_harm() -> None:
    """The server begins with the limit of open files that most machines have, less than it needs here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * OPEN + 200:
        pytest.skip(f"no more than {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    with ExitStack() as after:
        after.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        process, address = after.enter_context(running(*FAKE))
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        host, _, port = address.removeprefix("http://").rpartition(":")
        client = after.enter_context(httpx.Client(timeout=30))
        chat = f"{address}/v1/chat/completions"
        alone = sorted(_seconds(client, chat) for _ in range(20))[10]
        for number in range(OPEN):
            silent = after.enter_context(socket.create_connection((host, int(port))))
            if number % 2:
                silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        among = sorted(_seconds(client, chat) for _ in range(20))[10]
        assert httpx.post(chat, json=BODY, timeout=30).status_code == 200  # by a connection of its own
        assert process.poll() is None
    assert among < 3 * alone + 0.02


def test_a_connection_without_a_request_is_closed() -> None:
    """With nothing sent, and with headers that never end; one that has asked is kept."""
    code = (
        "import serve.one_process as one, sys; one.KEEP_ALIVE_SECONDS = 1\n"
        "from cluster.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    assert one_process.KEEP_ALIVE_SECONDS > 60
    with running(*FAKE, code=code) as (_, address):
        host, _, port = address.removeprefix("http://").rpartition(":")
        for sent in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with socket.create_connection((host, int(port)), timeout=10) as silent:
                silent.sendall(sent)
                start = time.monotonic()
                assert silent.recv(100) == b""
                assert 0.5 < time.monotonic() - start < 8


def test_closed_connections_leave_nothing_in_memory() -> None:
    with running(*FAKE) as (process, address):
        host, _, port = address.removeprefix("http://").rpartition(":")

        def ask(times: int) -> None:
            for _ in range(times):
                with socket.create_connection((host, int(port)), timeout=10) as once:
                    once.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    while once.recv(4096):
                        pass

        ask(500)
        before = _megabytes(process.pid)
        ask(3_000)
        assert _megabytes(process.pid) - before < 5


def _megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
