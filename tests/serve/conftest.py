"""One fake server for the tests that change nothing about it."""

from collections.abc import Iterator

import openai
import pytest

from serve.api import Api
from serve.limits import Limits
from tests.serve.server import fake_models, serving


@pytest.fixture(scope="session")
def fake_address() -> Iterator[str]:
    limits = Limits(body_bytes=3_000_000, pixels=250_000, images=4, batch=5, tokens=100)
    with fake_models() as models, serving(Api(models, limits)) as address:
        yield address


@pytest.fixture
def client(fake_address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fake_address}/v1", api_key="none", max_retries=0) as client:
        yield client
