"""The OpenAPI description: its examples run, and nothing made from it finds a fault of the server's."""

from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from serve.openapi import CAPTION_EXAMPLE, CHAT_EXAMPLE


def _paths(address: str) -> dict[str, Any]:
    paths: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()["paths"]
    return paths


def test_the_examples_of_the_page_run(fake_address: str) -> None:
    described = _paths(fake_address)
    for path, model in (("/v1/chat/completions", "fake-chat"), ("/v1/captions", "fake-captioner")):
        content = described[path]["post"]["requestBody"]["content"]["application/json"]
        assert content["example"] in (CHAT_EXAMPLE, CAPTION_EXAMPLE)
        answer = httpx.post(fake_address + path, json=content["example"] | {"model": model})
        assert answer.status_code == 200, answer.text


def test_bodies_and_errors_are_described(fake_address: str) -> None:
    page = httpx.get(f"{fake_address}/openapi.json").json()
    schemas = page["components"]["schemas"]
    assert {"ChatRequest", "CaptionRequest", "Error", "Message"} <= set(schemas)
    assert {"400", "401", "413", "429", "503"} <= set(
        page["paths"]["/v1/chat/completions"]["post"]["responses"]
    )


def test_requests_made_from_the_description_find_no_fault(fake_address: str) -> None:
    """Good and bad ones, a few dozen a route."""
    schema = schemathesis.openapi.from_url(f"{fake_address}/openapi.json")
    phases = (Phase.explicit, Phase.generate)
    checked = settings(
        max_examples=30,
        deadline=None,
        phases=phases,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    tried = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()

        @checked
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            nonlocal tried
            tried += 1
            case.call_and_validate(checks=[not_a_server_error], timeout=20)

        call()
    assert tried > 60
