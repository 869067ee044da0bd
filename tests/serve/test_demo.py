"""The demo without a browser: what it sends, what it keeps, and what it refuses before it starts."""

import asyncio
import json
import re
import signal
import socket
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx
import pytest

from serve.demo.client import ApiClient, Failed
from serve.demo.dialogue import answer, api_messages, append_feedback, failure, parts, question
from serve.demo.toys import toy_api
from sharegpt4v.errors import RunFailed
from tests.commands import REPOSITORY, command, environment, sharegpt4v
from tests.serve.server import png


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return str(path)


def test_every_form_of_a_message_has_its_text_and_files() -> None:
    assert parts({"content": "a"}) == ("a", [])
    for text in ("a < b & c", "&lt;b&gt;", "<b>x</b>"):
        assert "<" not in answer(text)["content"] and parts(answer(text))[0] == text
    assert parts(question("a", ["x.png"])) == ("a", ["x.png"])
    shown = [{"type": "file", "file": {"path": "x.png"}}, {"type": "text", "text": "a"}]
    assert parts({"content": shown}) == ("a", ["x.png"])


def test_questions_without_an_answer_are_not_sent_again(photo: str) -> None:
    history = [
        *(question("one", [photo]), answer("first")),
        *(question("fails", []), failure("no connection")),
        *(question("stopped", []), question("two", [])),
    ]
    sent = api_messages(history)
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert [part["type"] for part in sent[0]["content"]] == ["image_url", "text"]
    assert sent[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert sent[2]["content"] == [{"type": "text", "text": "two"}]


def test_a_thumb_is_a_line_with_the_dialogue_up_to_it(tmp_path: Path, photo: str) -> None:
    file = tmp_path / "feedback.jsonl"
    history = [question("one", [photo]), answer("first"), question("two", []), answer("second")]
    append_feedback(file, history, 1, True)
    append_feedback(file, history, 3, "Dislike")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["thumb"] for line in lines] == ["up", "down"]
    assert lines[0]["dialogue"][-1] == {"role": "assistant", "text": "first", "images": 0}
    assert lines[0]["dialogue"][0]["images"] == 1 and "base64" not in file.read_text()


def test_what_fails_is_told_as_the_api_says_it(fake_address: str, photo: str, tmp_path: Path) -> None:
    async def text(api: ApiClient, model: str, messages: Any) -> str:
        return "".join([piece async for piece in api.stream(model, messages, 0, 50)])

    api = ApiClient(fake_address, None)
    assert ("fake-chat", "chat") in api.models()
    messages = api_messages([question("?", [photo])])
    assert asyncio.run(text(api, "fake-chat", messages)).endswith("light.")
    with pytest.raises(Failed, match="no such model"):
        asyncio.run(text(api, "gpt-4", messages))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>" * 9)
    with pytest.raises(Failed, match="an image cannot be used"):
        asyncio.run(api.captions(None, [str(broken)]))
    away = ApiClient("http://127.0.0.1:9", None)
    for call in (lambda: away.models(), lambda: asyncio.run(text(away, "m", messages))):
        with pytest.raises(Failed, match="is `sharegpt4v serve` running"):
            call()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from elsewhere: give --login"),
        (["--login", "/nonexistent"], "--login: cannot read /nonexistent"),
        (["--api-key-file", "/nonexistent"], "--api-key-file: cannot read /nonexistent"),
        (["--api", "localhost:8000"], "--api: 'localhost:8000' is refused"),
        (["--toys", "--api", "http://127.0.0.1:8000"], "--toys: the toy models' own server is asked"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], said: str) -> None:
    done = sharegpt4v("demo", *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_toy_models_are_served_beside_the_page_and_end_with_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = command("demo", "--toys", "--port", port, "--feedback", str(tmp_path / "f"))
    with Popen(words, cwd=REPOSITORY, env=environment(), stdout=PIPE, text=True) as demo:
        assert demo.stdout is not None
        page, url = re.match(r"ready: (\S+) \(API: (\S+)\)", demo.stdout.readline()).groups()  # type: ignore[union-attr]
        assert httpx.get(page).status_code == 200
        api = ApiClient(url, None)
        assert dict(api.models()) == {"toy-captioner": "captioner", "toy-chat": "chat"}
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(20) == 143
        with pytest.raises(Failed, match="no connection"):
            api.models()


def test_a_server_that_cannot_start_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with toy_api() as toys, pytest.raises(RunFailed, match="ended with code 1"):
        toys.url()


def test_a_port_in_use_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = sharegpt4v("demo", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "--port: cannot listen on 127.0.0.1" in done.stderr
