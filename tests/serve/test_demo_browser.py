"""The demo in a real browser, on a desk and on a phone: make test-browser."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.api import Api
from serve.limits import Limits
from sharegpt4v.engine.handle import Engine
from tests.captions.browser import CHROMIUM
from tests.serve.server import fake_models, png, serving
from tests.serve.test_app import running

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]

Demo = tuple[Any, Path, Engine]


@pytest.fixture(params=[1280, 390], ids=["desk", "phone"])
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Demo]:
    """A page of the demo, the file of its thumbs, and the engine behind it: 3 s an answer."""
    from playwright.sync_api import sync_playwright

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    feedback = tmp_path / "feedback.jsonl"
    with (
        fake_models(seconds=3) as models,
        serving(Api(models, Limits(pixels=250_000))) as address,
        running("demo", "--api", address, "--port", port, "--feedback", str(feedback), wait=60) as (_, url),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": request.param, "height": 900})
        outside: list[str] = []
        page.on("request", lambda sent: outside.append(sent.url) if "127.0.0.1" not in sent.url else None)
        page.goto(url)
        page.wait_for_selector("#question textarea")
        page.wait_for_timeout(1500)  # until the models are listed
        yield page, feedback, models["fake-chat"].engine
        assert page.evaluate("document.documentElement.scrollWidth") <= request.param
        assert [one for one in outside if one.startswith("http")] == []
        browser.close()


def _ask(page: Any, text: str, *images: Path) -> None:
    if images:
        page.set_input_files("#question input[type=file]", [str(image) for image in images])
        page.wait_for_timeout(700)
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def _until(page: Any, condition: str, seconds: float = 15) -> None:
    page.wait_for_function(condition, timeout=seconds * 1000)


CHAT = "document.querySelector('#chat').innerText"


def test_two_rounds_stream_and_are_judged_edited_and_cleared(demo: Demo, tmp_path: Path) -> None:
    page, feedback, _ = demo
    photo = tmp_path / "photo.png"
    photo.write_bytes(png())
    _ask(page, "What is <b>this</b>?", photo)
    _until(page, f"{CHAT}.includes('stands')")
    early = page.inner_text("#chat")
    _until(page, f"({CHAT}.match(/in the light\\./g) || []).length >= 1")
    page.wait_for_timeout(3500)
    assert len(page.inner_text("#chat")) > len(early), "the answer was there at once"
    assert "<b>this</b>" in page.inner_text("#chat")
    _ask(page, "And what else?")
    _until(page, f"{CHAT}.split('And what else?')[1]?.includes('in the light.')")
    page.wait_for_timeout(3500)
    page.locator("#chat button[aria-label='Like'], #chat button[title='Like']").last.click()
    page.wait_for_timeout(700)
    (line,) = map(json.loads, feedback.read_text().splitlines())
    assert line["thumb"] == "up" and [one["role"] for one in line["dialogue"]] == ["user", "assistant"] * 2
    page.locator("#chat button[aria-label='Edit'], #chat button[title='Edit']").last.click()
    page.locator("#chat textarea").last.fill("Anything more?")
    page.locator("#chat button[aria-label='Submit'], #chat button[title='Submit']").last.click()
    _until(page, f"{CHAT}.split('Anything more?')[1]?.includes('in the light.')")
    assert "And what else?" not in page.inner_text("#chat")
    page.click("#clear")
    _until(page, f"!{CHAT}.includes('Anything more?')")


def test_stop_frees_the_slot_and_the_box_is_alive(demo: Demo) -> None:
    page, _, engine = demo
    _ask(page, "Hello?")
    _until(page, f"{CHAT}.includes('stands')")
    page.locator("#question button[aria-label='Stop'], #question .stop-button").click()
    page.wait_for_timeout(1500)
    assert engine.stats().running == 0 and engine.stats().cancelled == 1
    _ask(page, "Once more?")
    _until(page, f"{CHAT}.split('Once more?')[1]?.includes('in the light.')")


def test_an_error_says_its_reason_and_the_box_is_alive(demo: Demo, tmp_path: Path) -> None:
    page, _, _ = demo
    large = tmp_path / "large.png"
    large.write_bytes(png(0, 700, 700))
    _ask(page, "And this?", large)
    _until(page, f"{CHAT}.includes('No answer: an image cannot be used')")
    _ask(page, "Without it?")
    _until(page, f"{CHAT}.split('Without it?')[1]?.includes('in the light.')")


def test_a_batch_has_its_captions_beside_and_as_a_file(demo: Demo, tmp_path: Path) -> None:
    page, _, _ = demo
    images = []
    for number in range(3):
        images.append(tmp_path / f"{number}.png")
        images[-1].write_bytes(png(number) if number else b"<html>" * 9)
    page.get_by_role("tab", name="Captions").click()
    page.set_input_files("#images input[type=file]", [str(image) for image in images])
    page.wait_for_timeout(1000)
    page.click("#caption")
    _until(page, "document.querySelector('#captions').innerText.includes('in the light.')")
    shown = page.inner_text("#captions")
    assert "No caption: an image cannot be used" in shown and shown.count("in the light.") >= 2
    with page.expect_download() as begun:
        page.click("#download")
    rows = json.loads(Path(begun.value.path()).read_text())
    assert [row["filename"] for row in rows] == ["0.png", "1.png", "2.png"] and "error" in rows[0]
