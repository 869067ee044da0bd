"""Two replicas of the toy chat model: a second round goes where the first one was."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.images import write_images
from tests.serve.server import data_url, user
from tests.serve.test_app import running
from tests.serve.test_on_ray import free_port

pytestmark = [pytest.mark.workers, pytest.mark.timeout(300)]

DIALOGUES = 12


def test_second_rounds_find_their_prefix_and_both_replicas_work(tmp_path: Path) -> None:
    write_images(tmp_path, DIALOGUES)
    images = [path.read_bytes() for path in sorted(tmp_path.rglob("*.jpg"))]
    arguments = ("serve", "--captioner", "none", "--port", str(free_port()), "--replicas", "2")
    with running(*arguments, "--slots", str(DIALOGUES), wait=180) as (_, address):
        dialogues: list[list[Any]] = [[user(UNIFIED_CAPTION.text, data_url(image))] for image in images]
        first = _ask_all(address, dialogues)
        for said, answer in zip(dialogues, first, strict=True):
            said += [{"role": "assistant", "content": answer.choices[0].message.content}]
            said += [user("What else is there?")]
        time.sleep(2.5)  # by then every replica has reported and heard
        by_replica = _prompts_by_replica(address)
        assert len(by_replica) == 2 and min(by_replica.values()) > 0, by_replica
        second = _ask_all(address, dialogues)
    for before, after in zip(first, second, strict=True):
        assert after.usage.prompt_tokens_details.cached_tokens >= before.usage.prompt_tokens - 2


def _ask_all(address: str, dialogues: list[list[Any]]) -> list[Any]:
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", timeout=60, max_retries=0) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        return list(
            pool.map(
                lambda said: client.chat.completions.create(model="toy-chat", messages=said, max_tokens=20),
                dialogues,
            )
        )


def _prompts_by_replica(address: str) -> dict[str, float]:
    page = httpx.get(f"{address}/metrics", timeout=10).text
    found = re.findall(r'engine_prompt_tokens_total{[^}]*replica="(\w+)"[^}]*} ([\d.e+]+)', page)
    return {replica: float(tokens) for replica, tokens in found}
