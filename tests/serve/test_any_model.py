"""Any vision-language model that transformers knows, behind the API: a tiny Qwen2.5-VL made on the spot."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from serve.api import Api
from serve.models import EngineOptions, load_model
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.images import prepare_whole
from tests.models.tiny_vlms import save_qwen
from tests.serve.server import data_url, png, serving, user

SHAPES = [(60, 60), (120, 48), (57, 112), (40, 41)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = save_qwen(tmp_path_factory.mktemp("vlm") / "qwen")
    model = load_model("chat", str(folder), EngineOptions("transformers", slots=4))
    with serving(Api({model.info.id: model})) as address:
        yield address, model
    model.engine.close()


def test_chats_give_the_texts_of_the_engine(served: tuple[str, Any]) -> None:
    """Eight at a time, half of them streamed, images of four shapes."""
    address, model = served
    images = [png(seed, *shape) for seed, shape in enumerate(SHAPES * 2)]
    offline = [
        model.engine.submit(
            Request(
                str(number),
                (Turn("user", "Describe this.", (prepare_whole(image, 10**6).pixels,)),),
                SamplingParams(max_new_tokens=12),
            )
        ).result(60)
        for number, image in enumerate(images)
    ]

    def ask(number: int) -> tuple[str, int]:
        body: Any = {"model": "qwen", "max_tokens": 12}
        body["messages"] = [user("Describe this.", data_url(images[number]))]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", timeout=60) as client:
            if number % 2:
                chunks = list(
                    client.chat.completions.create(
                        **body, stream=True, stream_options={"include_usage": True}
                    )
                )
                assert chunks[-1].usage
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                return text, chunks[-1].usage.prompt_tokens
            answer = client.chat.completions.create(**body)
            assert answer.usage
            return answer.choices[0].message.content or "", answer.usage.prompt_tokens

    with ThreadPoolExecutor(8) as pool:
        online = list(pool.map(ask, range(len(images))))
    assert online == [(answer.text, answer.prompt_tokens) for answer in offline]
    assert len({text for text, _ in online}) > 1 and len({tokens for _, tokens in online}) > 1


def test_what_it_lacks_is_refused(served: tuple[str, Any]) -> None:
    address, _ = served
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["max_pixels"] > 10_000
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", timeout=60) as client:
        with pytest.raises(openai.BadRequestError, match="log probabilities"):
            client.chat.completions.create(model="qwen", messages=[user("?")], logprobs=True)
        with pytest.raises(openai.BadRequestError, match="context"):
            client.chat.completions.create(model="qwen", messages=[user("a " * 2_000)])
