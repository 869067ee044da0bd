"""Chats through the official client, unchanged: sync, async and streaming, good requests and bad ones."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.serve.server import data_url, png, user

MODES = ("sync", "stream", "async", "async stream")
PHOTO, OTHER, SMALL = data_url(png(1)), data_url(png(2)), data_url(png(3, 4, 4))
QUESTION: dict[str, Any] = {"model": "fake-chat", "messages": [user("What is this?", PHOTO)]}
ROUNDS = [user("What is this?", PHOTO), {"role": "assistant", "content": "A boat."}, user("And this?", OTHER)]

Said = tuple[str, str, int]
"""Text, finish reason and tokens of the answer."""


def _whole(answer: Any) -> Said:
    choice = answer.choices[0]
    return choice.message.content, choice.finish_reason, answer.usage.completion_tokens


def _joined(chunks: list[Any]) -> Said:
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.choices for chunk in chunks if chunk.usage] == [[]]  # the last one alone has it
    return text, chunks[-2].choices[0].finish_reason, chunks[-1].usage.completion_tokens


def ask(mode: str, client: openai.OpenAI, body: dict[str, Any]) -> Said:
    """Sends a body as OpenAI's users do; fields that the client has no argument for go in extra_body."""
    own = {name: value for name, value in body.items() if name in ("top_k", "repetition_penalty", "nonsense")}
    given: Any = {name: value for name, value in body.items() if name not in own} | {"extra_body": own}
    stream = {"stream": True, "stream_options": {"include_usage": True}} if "stream" in mode else {}
    if "async" not in mode:
        answer = client.chat.completions.create(**given | stream)
        return _joined(list(answer)) if stream else _whole(answer)

    async def run() -> Said:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as there:
            answer = await there.chat.completions.create(**given | stream)
            return _joined([chunk async for chunk in answer]) if stream else _whole(answer)

    return asyncio.run(run())


GOOD: dict[str, dict[str, Any]] = {
    "an image": {},
    "a text alone": {"messages": [{"role": "user", "content": "Hello."}]},
    "several parts of text": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 3}]},
    "two rounds, each with an image": {"messages": ROUNDS},
    "two images in a message": {"messages": [user("Compare.", PHOTO, OTHER)]},
    "an image without text": {"messages": [user("", PHOTO)]},
    "JPEG bytes under the name PNG": {"messages": [user("?", data_url(png(3), "image/jpeg"))]},
    "control strings": {"messages": [user("<image> </s> USER: ASSISTANT: <TOKENS_UNUSED_1>")]},
    "marks of both directions and NUL": {"messages": [user("\u202eabc\u202c \x00 \x1b[0m")]},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "seed": 7},
    "fields of ours": {"top_k": 5, "repetition_penalty": 1.2},
    "max_completion_tokens": {"max_completion_tokens": 90},
    "both limits, equal": {"max_completion_tokens": 90, "max_tokens": 90},
    "values that ask for nothing": {"n": 1, "logprobs": False, "frequency_penalty": 0, "tools": []},
    "fields without effect": {"user": "me", "store": False, "metadata": {"a": "b"}},
    "a text as format": {"response_format": {"type": "text"}},
    "a detail": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PHOTO, "detail": "low"}}]}
        ]
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOOD)
def test_good_requests_are_answered(case: str, mode: str, client: openai.OpenAI) -> None:
    text, reason, tokens = ask(mode, client, QUESTION | GOOD[case])
    assert text.endswith("in the light.") and reason == "stop" and tokens > 12


@pytest.mark.parametrize("mode", MODES)
def test_answers_end_at_their_limit_and_at_stop_strings(mode: str, client: openai.OpenAI) -> None:
    whole = ask(mode, client, QUESTION)[0]
    short, reason, tokens = ask(mode, client, QUESTION | {"max_tokens": 5})
    assert (short, reason, tokens) == (" ".join(whole.split()[:5]), "length", 5)
    for stop in ("stands", ["nowhere", "stands"]):
        cut, reason, _ = ask(mode, client, QUESTION | {"stop": stop})
        assert (cut, reason) == (whole.split(" stands")[0], "stop")


def test_seeds_repeat_answers_and_without_one_they_differ(client: openai.OpenAI) -> None:
    warm = QUESTION | {"temperature": 1.0}
    assert len({ask("sync", client, warm | {"seed": 3}) for _ in range(3)}) == 1
    assert len({ask("sync", client, warm | {"seed": seed})[0] for seed in range(8)}) > 4


def _messages(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def _image(url: str) -> dict[str, Any]:
    return _messages(user("?", url))


ANSWER = {"role": "assistant", "content": "A boat."}
BAD: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "an unknown model": ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    "no messages": (_messages(), 400, "invalid_value", "messages"),
    "the assistant first": (_messages(ANSWER, user("?")), 400, "invalid_value", "messages.0.role"),
    "the user twice": (_messages(user("?"), user("?")), 400, "invalid_value", "messages.1.role"),
    "the assistant last": (_messages(user("?"), ANSWER), 400, "invalid_value", "messages"),
    "a tool's message": (
        _messages({"role": "tool", "content": "1", "tool_call_id": "x"}),
        400,
        "invalid_value",
        "messages.0.role",
    ),
    "an empty message": (
        _messages({"role": "user", "content": ""}),
        400,
        "invalid_value",
        "messages.0.content",
    ),
    "no content": (_messages({"role": "user", "content": None}), 400, "invalid_value", "messages.0.content"),
    "a number as content": (
        _messages({"role": "user", "content": 3}),
        400,
        "invalid_value",
        "messages.0.content",
    ),
    "an image of the assistant's": (
        _messages(user("?"), {**user("!", PHOTO), "role": "assistant"}, user("?")),
        400,
        "invalid_value",
        "messages.1.content.0.image_url",
    ),
    "a part of another kind": (
        _messages({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
        400,
        "invalid_value",
        "messages.0.content.0",
    ),
    "several answers": ({"n": 2}, 400, "unsupported_parameter", "n"),
    "no number of answers": ({"n": True}, 400, "unsupported_parameter", "n"),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "unsupported_parameter",
        "tools",
    ),
    "JSON as format": (
        {"response_format": {"type": "json_object"}},
        400,
        "unsupported_parameter",
        "response_format",
    ),
    "a penalty": ({"presence_penalty": 1.0}, 400, "unsupported_parameter", "presence_penalty"),
    "an unknown field": ({"nonsense": 1}, 400, "unknown_parameter", "nonsense"),
    "too many tokens": ({"max_tokens": 101}, 400, "invalid_value", "max_tokens"),
    "no tokens": ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    "a negative limit": ({"max_completion_tokens": -1}, 400, "invalid_value", "max_completion_tokens"),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "invalid_value", "max_tokens"),
    "a limit as text": ({"max_tokens": "5"}, 400, "invalid_value", "max_tokens"),
    "a high temperature": ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
    "a negative temperature": ({"temperature": -0.1}, 400, "invalid_value", "temperature"),
    "top_p 0": ({"top_p": 0}, 400, "invalid_value", "top_p"),
    "five stop strings": ({"stop": list("abcde")}, 400, "invalid_value", "stop"),
    "an empty stop string": ({"stop": [""]}, 400, "invalid_value", "stop"),
    "1,000 images": (_messages(user("?", *[SMALL] * 1000)), 400, "too_many_images", "messages"),
    "a long dialogue": (_messages(user("word " * 5000)), 400, "context_length_exceeded", "messages"),
    "bad base64": (_image("data:image/png;base64,!!!!"), 400, "invalid_image_url", None),
    "cut base64": (_image(PHOTO[:-1]), 400, "invalid_image_url", None),
    "a data URL of HTML": (_image(data_url(b"<html>", "text/html")), 400, "invalid_image_url", None),
    "HTML called an image": (_image(data_url(b"<html>" * 9)), 400, "image_not_an_image", None),
    "no base64": (_image("data:image/svg+xml,<svg/>"), 400, "invalid_image_url", None),
    "a cut image": (_image(data_url(png()[:-40])), 400, "image_truncated", None),
    "an empty image": (_image("data:image/png;base64,"), 400, "image_empty", None),
    "a large image": (_image(data_url(png(0, 600, 600))), 400, "image_too_large", None),
    "http": (_image("http://example.com/a.png"), 400, "unsupported_image_url", None),
}
FETCHES = (
    *("https://example.com/a.png", "file:///etc/passwd", "http://127.1/", "http://0x7f.1/", "//localhost/a"),
    *("http://2130706433/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest"),
    *(
        "http://user@127.0.0.1/",
        "http://good.example\\@127.0.0.1/",
        "ftp://a/b",
        "a.png",
        "",
        " data:image/png,",
    ),
)
BAD |= {f"image_url {url!r}": (_image(url), 400, "unsupported_image_url", None) for url in FETCHES}


@pytest.mark.parametrize("mode", ("sync", "async stream"))
@pytest.mark.parametrize("case", BAD)
def test_bad_requests_raise_the_clients_own_errors(case: str, mode: str, client: openai.OpenAI) -> None:
    change, status, code, param = BAD[case]
    with pytest.raises(openai.APIStatusError) as raised:
        ask(mode, client, QUESTION | change)
    error = raised.value
    assert (error.status_code, error.code) == (status, code), error.message
    assert error.param == (param or "messages.0.content.0.image_url")
    assert error.request_id and "/work" not in error.message and "Traceback" not in error.message


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_come_first_and_once(role: str, client: openai.OpenAI) -> None:
    brief = {"role": role, "content": "Be brief."}
    parts = {"role": role, "content": [{"type": "text", "text": "Be brief."}]}
    for first in (brief, parts):
        assert ask("sync", client, QUESTION | _messages(first, user("?")))[0]
    for messages, place in (
        ([user("?"), brief], "messages.1.role"),
        ([brief, brief, user("?")], "messages.1.role"),
        ([brief], "messages"),
        ([brief, {"role": "assistant", "content": "a"}, user("?")], "messages.1.role"),
        ([{"role": role, "content": [_part_of_an_image()]}, user("?")], "messages.0.content.0.image_url"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            ask("sync", client, QUESTION | _messages(*messages))
        assert raised.value.param == place


def _part_of_an_image() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": PHOTO}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logprobs": True}, "logprobs"),  # the fake engine computes none
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "stream"])
def test_log_probabilities_that_cannot_be_had_are_refused(
    mode: str, change: dict[str, Any], param: str, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(mode, client, QUESTION | change)
    assert raised.value.param == param


def test_the_client_lists_and_finds_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake-chat", "fake-captioner"]
    assert client.models.retrieve("fake-chat").owned_by == "sharegpt4v"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    "make",
    [lambda client: client.embeddings.create(model="m", input="a"), lambda client: client.files.list()],
)
def test_paths_that_are_not_served_are_not_found(
    make: Callable[[openai.OpenAI], Any], client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError):
        make(client)
