"""`sharegpt4v serve` as a process, without Ray, and what it refuses before anything starts."""

import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx
import pytest

from serve.keys import is_loopback
from tests.commands import REPOSITORY, command, environment, sharegpt4v
from tests.serve.server import user

FAKE = ("serve", "--without-ray", "--engine", "fake", "--port", "0")
BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("Hello?")]}


@contextmanager
def running(*arguments: str, wait: float = 30, code: str = "") -> Iterator[tuple["Popen[str]", str]]:
    """A server in a process of its own, and its address. code: Python in place of the command's own."""
    words = [sys.executable, "-c", code, *arguments] if code else command(*arguments)
    process = Popen(words, cwd=REPOSITORY, env=environment(), stdout=PIPE, stderr=PIPE, text=True)
    try:
        assert process.stdout is not None
        timer = threading.Timer(wait, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        found = re.match(r"ready: (http://[^\s/]+)(?:/v1)? ", line)
        assert found, line + (process.stderr.read() if process.stderr else "")
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def test_sigterm_cuts_no_answer_and_refuses_new_ones() -> None:
    with running(*FAKE, "--fake.seconds-per-request", "3") as (process, address):
        chat = f"{address}/v1/chat/completions"
        answers: list[httpx.Response] = []
        asked = threading.Thread(
            target=lambda: answers.append(httpx.post(chat, json=BODY | {"stream": True}, timeout=20))
        )
        asked.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late = httpx.post(chat, json=BODY)
        assert late.status_code == 503 and late.headers["retry-after"]
        assert process.wait(20) == 0
        asked.join()
    assert answers[0].text.endswith("data: [DONE]\n\n")


def test_drain_ends_after_its_time_and_a_second_signal_ends_it_at_once() -> None:
    slow = (*FAKE, "--fake.seconds-per-request", "60")
    for signals, drain, most in ((1, "1", 8.0), (2, "60", 2.0)):
        with running(*slow, "--drain-seconds", drain) as (process, address):
            asked = threading.Thread(target=_try, args=(f"{address}/v1/chat/completions",), daemon=True)
            asked.start()
            time.sleep(1)
            start = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            process.wait(20)
            assert time.monotonic() - start < most


def _try(url: str) -> None:
    try:
        httpx.post(url, json=BODY, timeout=30)
    except httpx.HTTPError:
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from elsewhere: give --api-keys"),
        (["--host", "::"], "--host: :: can be reached from elsewhere"),
        (["--api-keys", "/nonexistent"], "--api-keys: cannot read /nonexistent"),
        (["--captioner", "none", "--chat", "none"], "--chat: neither this nor --captioner names a model"),
        (["--captioner", "/nonexistent"], "--captioner: /nonexistent: cannot read"),
        (["--preset", "7b"], "--chat: neither this nor --captioner names a model"),
        (["--chat-name", "one", "--captioner-name", "one"], "--chat-name: both models are called one"),
        (["--replicas", "3:1"], "--replicas: '3:1' is refused"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_starts(arguments: list[str], said: str) -> None:
    done = sharegpt4v("serve", *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_port_in_use_is_refused_before_weights_are_loaded() -> None:
    with running(*FAKE) as (_, address):
        done = sharegpt4v("serve", "--without-ray", "--port", address.rpartition(":")[2])
    assert done.returncode == 2 and "--port: cannot listen on 127.0.0.1" in done.stderr


def test_keys_open_the_door_to_other_machines(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"a sha256:{'0' * 64}\n")
    done = sharegpt4v("serve", "--host", "0.0.0.0", "--api-keys", keys, "--dry-run")
    assert done.returncode == 0 and "1 keys" in done.stdout


def test_addresses_of_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "example.com", "127.0.0.1.example.com"))
    )
