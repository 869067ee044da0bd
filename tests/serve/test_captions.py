"""POST /v1/captions: one image or a batch, as JSON or as files."""

from typing import Any

import httpx
import pytest

from serve.api import Api
from tests.serve.server import data_url, fake_models, png, serving

URLS = [data_url(png(n)) for n in range(3)]


def _caption(address: str, **sent: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/captions", timeout=30, **sent)


def test_one_image_has_a_caption_a_verdict_and_its_tokens(fake_address: str) -> None:
    answer = _caption(fake_address, json={"image": URLS[0]}).json()
    (row,) = answer["data"]
    assert answer["model"] == "fake-captioner" and row["caption"].endswith("in the light.")
    assert row["verdict"] == {"accepted": True, "reason": None, "message": None}
    assert answer["usage"]["completion_tokens"] == row["usage"]["completion_tokens"] > 12


def test_files_and_data_urls_of_the_same_images_have_the_same_captions(fake_address: str) -> None:
    files = [("image", (f"{n}.png", png(n), "image/png")) for n in range(3)]
    uploaded = _caption(fake_address, files=files, data={"temperature": "0", "max_tokens": "90"}).json()[
        "data"
    ]
    sent = _caption(fake_address, json={"images": URLS}).json()["data"]
    assert [row["filename"] for row in uploaded] == ["0.png", "1.png", "2.png"]
    assert [row["caption"] for row in uploaded] == [row["caption"] for row in sent]
    assert len({row["caption"] for row in sent}) == 3


def test_one_broken_image_of_a_batch_leaves_the_others_their_captions(fake_address: str) -> None:
    answer = _caption(fake_address, json={"images": [URLS[0], data_url(b"<html>" * 9), "http://127.1/a.png"]})
    rows = answer.json()["data"]
    assert answer.status_code == 200 and rows[0]["caption"]
    assert [row["error"]["code"] for row in rows[1:]] == ["image_not_an_image", "unsupported_image_url"]
    assert [row["caption"] for row in rows[1:]] == [None, None]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ({"json": {}}, "wrong_number_of_images"),
        ({"json": {"images": []}}, "wrong_number_of_images"),
        ({"json": {"images": URLS * 2}}, "wrong_number_of_images"),
        ({"json": {"image": URLS[0], "images": URLS}}, "invalid_value"),
        ({"json": {"image": data_url(b"")}}, "image_empty"),
        ({"json": {"image": URLS[0], "max_tokens": 101}}, "invalid_value"),
        ({"json": {"image": URLS[0], "nonsense": 1}}, "unknown_parameter"),
        ({"json": {"image": URLS[0], "model": "gpt-4"}}, "model_not_found"),
        ({"files": {"nonsense": png()}}, "unknown_parameter"),
        ({"files": {"image": png()}, "data": {"max_tokens": "x"}}, "invalid_value"),
        ({"files": {"image": png()}, "data": {"max_tokens": "1_0"}}, "invalid_value"),
        ({"files": {"image": png()}, "data": {"max_tokens": "9" * 40}}, "invalid_value"),
        ({"files": {"image": png()}, "data": {"temperature": "NaN"}}, "invalid_value"),
        ({"files": {"image": png()}, "data": {"temperature": "1e999"}}, "invalid_value"),
        ({"files": {"image": png()}, "data": {"max_tokens": ["1", "2"]}}, "invalid_value"),
        ({"files": {"image": png()}, "data": {"nonsense": "x"}}, "unknown_parameter"),
        ({"files": [("image", png())] * 6}, "invalid_request"),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, "invalid_request"),
    ],
)
def test_wrong_requests_are_refused(sent: dict[str, Any], code: str, fake_address: str) -> None:
    answer = _caption(fake_address, **sent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404 if "model" in code else 400, code)


def test_a_caption_that_the_gate_refuses_is_shown_with_the_reason() -> None:
    with fake_models(refusal="refuse", length="cut") as models, serving(Api(models)) as address:
        for name, reason in (("refuse", "refusal"), ("cut", "cut_at_length_limit")):
            answer = _caption(address, json={"image": URLS[0]}, headers={"x-request-id": name})
            (row,) = answer.json()["data"]
            assert row["verdict"]["reason"] == reason and row["caption"]
        page = httpx.get(f"{address}/metrics").text
        assert 'sharegpt4v_captions_total{replica="0",verdict="refusal"} 1.0' in page
