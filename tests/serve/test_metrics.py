"""/metrics: what Prometheus reads, and what the dashboard asks it for."""

import json
import re
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serve.api import Api
from tests.commands import REPOSITORY
from tests.serve.server import data_url, fake_models, png, serving, user

BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("What is this?", data_url(png()))]}
DASHBOARD = REPOSITORY / "cluster" / "serve" / "grafana.json"


def _page() -> str:
    """The metrics after a stream, a whole answer, a caption and an error."""
    with fake_models() as models, serving(Api(models)) as address:
        for more in ({"stream": True}, {}, {"n": 2}):
            httpx.post(f"{address}/v1/chat/completions", json=BODY | more)
        httpx.post(f"{address}/v1/captions", json={"image": data_url(png())})
        return httpx.get(f"{address}/metrics").text


def test_the_page_is_one_that_prometheus_reads_and_its_numbers_are_right() -> None:
    families = {family.name: family for family in text_string_to_metric_families(_page())}
    values = {
        (
            sample.name,
            sample.labels.get("route") or sample.labels.get("model"),
            sample.labels.get("status"),
        ): sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    chat = "/v1/chat/completions"
    assert values["sharegpt4v_http_requests_total", chat, "200"] == 2
    assert values["sharegpt4v_http_requests_total", chat, "400"] == 1
    assert values["sharegpt4v_http_first_token_seconds_count", "fake-chat", None] == 2
    assert values["sharegpt4v_engine_first_token_seconds_count", "fake-chat", None] >= 1
    assert values["sharegpt4v_engine_prompt_tokens_total", "fake-chat", None] > 1000
    assert values["sharegpt4v_http_in_flight", None, None] == 0
    buckets = [
        sample.value
        for sample in families["sharegpt4v_engine_next_token_seconds"].samples
        if "le" in sample.labels
    ]
    assert buckets[: len(buckets) // 2] == sorted(buckets[: len(buckets) // 2])


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    known = set(re.findall(r"^(sharegpt4v_\w+)[{ ]", _page(), re.MULTILINE))
    asked = set(re.findall(r"sharegpt4v_\w+", DASHBOARD.read_text()))
    assert len(asked) > 10 and asked - known == set()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels) == 10
