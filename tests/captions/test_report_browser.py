"""report.html and the page of two runs in a real browser: filters, orders, links of charts, the viewer."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sharegpt4v.captions.compare import write_comparison
from sharegpt4v.captions.report import write_report
from tests.captions.browser import opened, status
from tests.captions.fake_run import caption, reject, write_images, write_run

pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> \u202ekcab\u0000 </p></ul>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captions of two sources, every third with a red bus, one hostile; and two rejects."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        caption(f"row-{n:02}", f"A {'Red' if n % 3 == 0 else 'green'} bus, number {n}.", source=source)
        for n, source in enumerate(["coco"] * 8 + ["web landmark"] * 4)
    ]
    rows[1]["caption"] = HOSTILE
    rows[2] |= {"attempt": 1, "caption": "A long green bus stands in front of a house with a number on it."}
    rows[4]["finish_reason"] = "length"
    rejects = [
        reject("gone", "missing"),
        reject("loop", "repetition", stage="gate", caption="A red bus. A red bus.", attempt=1),
    ]
    write_images(folder, [*rows, rejects[1] | {"width": 9, "height": 9}])
    return write_report(write_run(folder / "run", rows, rejects), root=str(folder))


VIEWS = {
    "": 14,
    "source=coco": 10,
    "source=web+landmark&q=red": 1,
    "q=RED%20bus": 5,
    "q=row-07": 1,
    "q=tokens": 0,  # a word of the page, not of a caption
    "source=nowhere": 0,
    "show=retried": 2,
    "show=cut": 1,
    "show=rejected": 2,
    "show=rejected&reason=missing": 1,
    "length=0-30": 10,  # rejects have no caption to measure
    "length=60-": 2,
    "order=characters": 14,
    "order=-characters": 14,
    "order=place": 14,
}
"""What follows # in the address, and how many cards it shows."""


@pytest.fixture(scope="module")
def views(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the browser shows at each address of VIEWS, one after the other in one visit."""
    user = f"""(async () => {{
      const seen = {{}};
      for (const view of {json.dumps(["gallery", *VIEWS])}) {{
        location.hash = view;
        await new Promise((done) => addEventListener("hashchange", done, {{ once: true }}));
        const shown = [...document.querySelectorAll("#cards > li")].filter((card) => card.offsetParent);
        seen[view] = {{
          ids: shown.map((card) => card.querySelector(".mono[title]").textContent),
          status: document.getElementById("count").textContent,
          nothing: !document.getElementById("nothing").hidden,
        }};
      }}
      document.body.dataset.seen = JSON.stringify(seen);
    }})()"""
    dom = opened(page, "#q=nowhere", tmp_path_factory.mktemp("views"), user)
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found
    seen: dict[str, dict[str, Any]] = json.loads(html.unescape(found[1]))
    return seen


@pytest.mark.parametrize(("view", "count"), VIEWS.items())
def test_the_gallery_shows_the_view_that_the_address_names(
    views: dict[str, dict[str, Any]], view: str, count: int
) -> None:
    seen = views[view]
    assert len(seen["ids"]) == count
    assert seen["status"] == f"{count} of 14 shown"
    assert seen["nothing"] == (count == 0)


def test_a_place_in_the_page_leaves_the_view_as_it_is(views: dict[str, dict[str, Any]]) -> None:
    assert views["gallery"]["status"] == "0 of 14 shown"  # as the address that was opened asks for


def test_cards_are_sorted_by_length_and_by_manifest(views: dict[str, dict[str, Any]]) -> None:
    shortest, longest = views["order=characters"]["ids"], views["order=-characters"]["ids"]

    assert longest[:2] == ["row-01", "row-02"] and longest[-1] == shortest[-1] == "gone"
    assert shortest[-3:-1] == ["row-02", "row-01"]
    assert views["order=place"]["ids"] == [*(f"row-{n:02}" for n in range(12)), "gone", "loop"]
    assert views[""]["ids"] != views["order=place"]["ids"]


def test_clicks_and_typing_are_kept_in_the_address(page: Path, tmp_path: Path) -> None:
    user = """
      document.querySelector('#sources [data-value="coco"]').click();
      search.value = "red";
      search.dispatchEvent(new Event("input"));
      order.value = "characters";
      order.dispatchEvent(new Event("change"));
      document.body.dataset.address = location.hash;
      location.hash = "gallery";  // the skip link: a place, which must not end the view
    """
    dom = opened(page, "", tmp_path, user)

    assert 'data-address="#source=coco&amp;q=red&amp;order=characters"' in dom
    assert status(dom) == "4 of 14 shown"
    assert re.findall(r'data-value="([^"]*)" aria-pressed="true"', dom) == ["", "coco"]


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ('svg a[href="#length=20-21"]', "4 of 14 shown"),
        ('.bars a[href*="missing"]', "1 of 14 shown"),
        ('td a[href="#source=web%20landmark"]', "4 of 14 shown"),
        ('.words a[href="#q=red"]', "5 of 14 shown"),
    ],
)
def test_bars_are_links_into_the_gallery(page: Path, tmp_path: Path, link: str, shown: str) -> None:
    user = f"""
      const link = document.querySelector(`{link}`);
      link.focus();
      document.body.dataset.focused = String(document.activeElement === link);
      link.dispatchEvent(new MouseEvent("click", {{ bubbles: true, cancelable: true }}));
    """
    dom = opened(page, "", tmp_path, user)

    assert 'data-focused="true"' in dom
    assert status(dom) == shown


def test_a_filter_that_came_from_a_bar_can_be_taken_away(page: Path, tmp_path: Path) -> None:
    user = "document.querySelector('#narrowed button').click();"
    assert status(opened(page, "#length=60-&source=coco", tmp_path, user)) == "10 of 14 shown"


def test_a_picture_is_enlarged_and_arrow_keys_walk_through_those_shown(page: Path, tmp_path: Path) -> None:
    user = """
      const shown = [...document.querySelectorAll("#cards .card:not([hidden]) .zoom")];
      const seen = [];
      const look = () => seen.push(document.querySelector("#viewer-text .mono").textContent);
      shown[1].click();
      look();
      for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) {
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        look();
      }
      seen.push(document.getElementById("viewer-place").textContent, viewer.open);
      viewer.addEventListener("close", () => setTimeout(() => {
        document.body.dataset.seen = [...seen, document.activeElement === shown[2]].join("|");
      }));
      viewer.close();
    """
    dom = opened(page, "#q=green&order=place&source=web+landmark", tmp_path, user)

    seen = ["row-10", "row-11", "row-08", "row-11", "3 of 3", "true"]
    assert f'data-seen="{"|".join(seen)}|true"' in dom  # the focus is where the walk ended


def test_a_long_caption_can_be_unfolded(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", [caption("a", "word " * 400)]), root=None)

    assert re.search(r'aria-expanded="false"[^>]*>Show all<', opened(page, "", tmp_path))
    user = 'document.querySelector(".text button").click()'
    assert re.search(r'aria-expanded="true"[^>]*>Show less<', opened(page, "", tmp_path, user))


def test_hostile_captions_stay_text_in_the_browser(page: Path, tmp_path: Path) -> None:
    dom = opened(page, "", tmp_path)

    assert "<title>run" in dom
    assert len(re.findall(r"<script\b", dom)) == 1
    assert "onerror=alert" not in "".join(re.findall(r"<[a-z][^>]*>", dom))
    assert html.escape(HOSTILE.replace("\0", "␀"), quote=False) in dom


WIDTHS = """
  const wide = [...document.querySelectorAll("body *")].filter((node) => node.getClientRects().length
    && !node.closest(".scroll, .unseen, dialog") && node.getBoundingClientRect().right > innerWidth + 0.5);
  document.body.dataset.wide = innerWidth + wide.map((node) => " " + node.tagName + "." + node.className);
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_reaches_beyond_a_phone_or_a_laptop(tmp_path: Path, width: int) -> None:
    """Chromium's own window is never that narrow: the page is measured in a frame."""
    names = ["n" * 60, *(f"a source of some length {n}" for n in range(8))]
    rows = [caption(f"{'i' * 90}-{n}", "w" * 200, source=name) for n, name in enumerate(names)]
    one, two = (
        write_run(
            tmp_path / name / ("r" * 40),
            rows,
            [reject("x", "r" * 60, message="m" * 200)],
            settings={"prompt_text": "p" * 3_000, "git_revision": name * 80},
        )
        for name in ("a", "b")
    )
    pages = [write_report(one, root=None), tmp_path / "two.html"]
    write_comparison(one, two, pages[1])
    for page in pages:
        assert page.stat().st_size < 1_000_000
        page.write_text(page.read_text().replace("</body>", f"<script>{WIDTHS}</script></body>"))
        frame = tmp_path / "frame.html"
        frame.write_text(f"""<iframe srcdoc="{html.escape(page.read_text())}" id=f style="width:{width}px;
          height:900px;border:0"></iframe><script>onload = () => {{ document.body.dataset.wide =
          f.contentDocument.body.dataset.wide }}</script>""")
        assert re.findall(r'data-wide="([^"]*)"', opened(frame, "", tmp_path)) == [str(width)]


def test_the_page_of_two_runs_filters_and_sorts_pairs(tmp_path: Path) -> None:
    texts = ["a red cup on a table", "a red cup", "three dogs run", "a red cup on a table"]
    others = ["a red cup on a table", "a blue cup", "a boat at sea", "a red cup on a chair"]
    one, two = (
        write_run(tmp_path / name / "run", [caption(f"row-{n}", text) for n, text in enumerate(side)])
        for name, side in (("a", texts), ("b", others))
    )
    write_comparison(one, two, tmp_path / "two.html")

    dom = opened(tmp_path / "two.html", "#show=different&order=-difference", tmp_path)

    assert status(dom) == "3 of 4 shown"
    assert re.findall(r'<bdi class="mono"[^>]*>([^<]*)<', dom) == ["row-2", "row-1", "row-3", "row-0"]
    assert ">blue</mark>" in dom and ">a boat at sea</mark>" in dom
