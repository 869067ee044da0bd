"""The shipped models through the API: the text of the offline commands, token for token."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.api import Api
from serve.models import EngineOptions, load_model
from sharegpt4v import Captioner, Chat
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.images import write_images
from tests.serve.server import data_url, serving, user


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("scenes")
    write_images(folder, 50)
    return [
        path.read_bytes() for path in sorted(Path(folder).rglob("*.*")) if path.suffix in (".png", ".jpg")
    ]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    options = EngineOptions(slots=8, threads=1)
    models = [load_model("captioner", "toy", options), load_model("chat", "toy", options)]
    with serving(Api({model.info.id: model for model in models})) as address:
        yield address
    for model in models:
        model.engine.close()


def test_captions_are_those_of_the_captioner_in_python(address: str, scenes: list[bytes]) -> None:
    with Captioner.load("toy", threads=1) as captioner:
        offline = captioner.caption(scenes)
    images = [data_url(scene) for scene in scenes]
    answer = httpx.post(f"{address}/v1/captions", json={"images": images}, timeout=60).json()
    assert [row["caption"] for row in answer["data"]] == offline
    assert all(row["verdict"]["accepted"] for row in answer["data"])


def test_dialogues_of_two_rounds_are_those_of_the_chat_in_python(address: str, scenes: list[bytes]) -> None:
    """Half of them streamed, eight at a time, so that they share the engine's steps."""

    def talk(number: int) -> list[str]:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", timeout=60) as client:
            said: list[Any] = []
            for question, images in _rounds(scenes, number):
                said.append(user(question, *[data_url(image) for image in images]))
                body: Any = {"model": "toy-chat", "messages": said, "max_tokens": 60}
                if number % 2:
                    chunks = client.chat.completions.create(**body, stream=True)
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                else:
                    text = client.chat.completions.create(**body).choices[0].message.content or ""
                said.append({"role": "assistant", "content": text})
            return [message["content"] for message in said[1::2]]

    with ThreadPoolExecutor(8) as pool:
        online = list(pool.map(talk, range(len(scenes))))
    with Chat.load("toy", threads=1) as chat:
        for number, answers in enumerate(online):
            chat.reset()
            offline = [chat.ask(q, *images, max_new_tokens=60) for q, images in _rounds(scenes, number)]
            assert answers == offline, number
    assert any(answers[0] for answers in online)


def test_log_probabilities_are_those_of_the_tokens_whole_and_streamed(
    address: str, scenes: list[bytes]
) -> None:
    body: Any = {"model": "toy-chat", "max_tokens": 25, "logprobs": True, "top_logprobs": 3}
    body["messages"] = [user(UNIFIED_CAPTION.text, data_url(scenes[0]))]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", timeout=60) as client:
        choice = client.chat.completions.create(**body).choices[0]
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**body, stream=True)]
        alone = client.chat.completions.create(**body | {"top_logprobs": None}).choices[0]
    assert choice.logprobs and choice.logprobs.content and alone.logprobs and alone.logprobs.content
    whole = choice.logprobs.content
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content or ()]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in whole]
    for one, other in zip(streamed, whole, strict=True):  # the second prompt's keys and values were there
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert sum(bool(chunk.logprobs) for chunk in chunks) > 3  # as they come, not all at the end
    text = b"".join(bytes(entry.bytes or ()) for entry in whole).decode()
    assert text.strip() == choice.message.content and len(whole) == 25
    for entry in whole:  # greedy: the token is the likeliest
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        assert 0 >= entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    assert all(entry.top_logprobs == [] for entry in alone.logprobs.content)


def test_instructions_change_the_answer_and_a_captioner_has_none(address: str, scenes: list[bytes]) -> None:
    """Random instructions lead the toy model, which has seen one line only, to another text."""
    question = user(UNIFIED_CAPTION.text, data_url(scenes[0]))
    said: Any = [{"role": "system", "content": "Colours places photograph where of and."}, question]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", timeout=60) as client:
        make = client.chat.completions.create
        answers = [make(model="toy-chat", messages=messages, max_tokens=40) for messages in (said, said[1:])]
        assert answers[0].usage and answers[1].usage
        assert answers[0].usage.prompt_tokens != answers[1].usage.prompt_tokens
        assert answers[0].choices[0].message.content != answers[1].choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="captioner") as raised:
            make(model="toy-captioner", messages=said)
    assert raised.value.param == "messages.0.role"


def _rounds(scenes: list[bytes], number: int) -> list[tuple[str, list[bytes]]]:
    later = [scenes[number - 1]] if number % 3 == 0 else []
    return [(UNIFIED_CAPTION.text, [scenes[number]]), ("What else is there?", later)]


def test_models_are_named_by_their_cards(address: str, scenes: list[bytes]) -> None:
    rows = httpx.get(f"{address}/v1/models").json()["data"]
    assert [(row["id"], row["kind"]) for row in rows] == [
        ("toy-captioner", "captioner"),
        ("toy-chat", "chat"),
    ]
    assert all(len(row["digest"]) == 12 for row in rows)
