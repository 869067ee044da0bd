"""The page of /docs in a real browser, on a desk and on a phone: make test-browser."""

from typing import Any

import pytest

from tests.captions.browser import CHROMIUM

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_asks_no_other_server_and_its_example_runs(width: int, fake_address: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked: list[str] = []
        page.on("request", lambda sent: asked.append(sent.url))
        page.goto(f"{fake_address}/docs")
        _try_captions(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert asked and all(url.startswith((fake_address, "data:")) for url in asked), asked


def _try_captions(page: Any) -> None:
    route = page.locator(".opblock-post", has_text="/v1/captions")
    route.locator(".opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    status = route.locator(".live-responses-table tbody .response-col_status").first
    status.wait_for(timeout=15_000)
    assert status.inner_text().split()[0] == "200"
