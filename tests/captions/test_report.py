"""report.html: what its numbers say, what it may hold, and how it behaves in a real browser."""

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sharegpt4v.captions import report
from sharegpt4v.captions.report import MAX_BYTES, write_report
from sharegpt4v.errors import UserError
from tests.captions.fake_run import caption, reject, write_images, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> \u202ekcab\u0000 </p></ul>"
CARD = re.compile(r'<li class="card[^>]*>')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def mixed(tmp_path: Path, root: Path) -> Path:
    """Twelve captions of two sources: every third names a red bus, and one of them is hostile."""
    rows = [
        caption(f"row-{n:02}", f"A {'Red' if n % 3 == 0 else 'green'} bus, number {n}.", source=source)
        for n, source in enumerate(["coco"] * 8 + ["web landmark"] * 4)
    ]
    rows[1]["caption"] = HOSTILE
    write_images(root, rows)
    return write_run(tmp_path / "run", rows, [reject("gone", "missing", source="coco")])


def opened(page: Path, fragment: str, tmp_path: Path) -> str:
    """The document after its script has run, as chromium prints it."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
    flags += " --virtual-time-budget=2000"  # timers and events run out before the document is printed
    flags += f" --disable-background-networking --disable-sync --user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *flags.split(), "--dump-dom", f"file://{page}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def shown(dom: str) -> int:
    return sum('hidden=""' not in card for card in CARD.findall(dom))


def status(dom: str) -> str:
    found = re.search(r'role="status"[^>]*>([^<]*)<', dom)
    assert found
    return found[1]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("fragment", "count"),
    [
        ("", 12),
        ("#source=coco", 8),
        ("#source=web+landmark&q=red", 1),
        ("#q=RED%20bus", 4),
        ("#q=row-07", 1),
        ("#source=nowhere", 0),
        ("#gallery", 12),
    ],
)
def test_the_browser_shows_the_view_that_the_address_names(
    mixed: Path, root: Path, tmp_path: Path, fragment: str, count: int
) -> None:
    dom = opened(write_report(mixed, root=str(root)), fragment, tmp_path)

    assert len(CARD.findall(dom)) == 12
    assert shown(dom) == count
    assert status(dom) == f"{count} of 12 shown"
    nothing = re.search(r'<p class="nothing"[^>]*>', dom)
    assert nothing and ("hidden" in nothing[0]) == (count > 0)


@pytest.mark.browser
def test_clicks_and_typing_are_kept_in_the_address(mixed: Path, root: Path, tmp_path: Path) -> None:
    page = write_report(mixed, root=str(root))
    user = """<script>
      document.querySelector('#chips [data-source="coco"]').click();
      search.value = "red";
      search.dispatchEvent(new Event("input"));
      document.body.dataset.address = location.hash;
      location.hash = "gallery";  // the skip link: a place, which must not end the view
    </script>"""
    page.write_text(page.read_text().replace("</body>", user + "</body>"))

    dom = opened(page, "", tmp_path)

    assert 'data-address="#source=coco&amp;q=red"' in dom
    assert status(dom) == "3 of 12 shown"
    assert re.findall(r'data-source="([^"]*)" aria-pressed="true"', dom) == ["coco"]


@pytest.mark.browser
def test_a_long_caption_can_be_unfolded(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", [caption("a", "word " * 400)]), root=None)
    click = '<script>document.querySelector(".card button").click()</script>'
    dom = opened(page, "", tmp_path)
    page.write_text(page.read_text().replace("</body>", click + "</body>"))

    assert re.search(r'aria-expanded="false"[^>]*>Show all<', dom)
    assert re.search(r'aria-expanded="true"[^>]*>Show less<', opened(page, "", tmp_path))


@pytest.mark.browser
def test_hostile_captions_stay_text_in_the_browser(mixed: Path, root: Path, tmp_path: Path) -> None:
    dom = opened(write_report(mixed, root=str(root)), "", tmp_path)

    assert "<title>run" in dom
    assert len(re.findall(r"<script\b", dom)) == 1
    assert "onerror=alert" not in "".join(re.findall(r"<[a-z][^>]*>", dom))
    assert html.escape(HOSTILE.replace("\0", "␀"), quote=False) in dom


def test_the_page_loads_nothing_from_anywhere(mixed: Path, root: Path) -> None:
    page = write_report(mixed, root=str(root)).read_text(encoding="utf-8")

    targets = re.findall(r"""\b(?:src|href|action|poster|data)\s*=\s*["']?([^"'\s>]*)""", page)
    assert targets and all(target.startswith(("data:", "#")) or target == "x" for target in targets)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_the_page_stays_below_its_size_with_noise_and_endless_captions(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_BYTES", 2_000_000)
    monkeypatch.setattr(report, "PAGE_BYTES", 200_000)
    noise = random.Random(0).randbytes
    rows = [caption(f"{n}" + "<" * 400, '"' * 1_000_000, image=f"{n}.jpg") for n in range(60)]
    for row in rows:
        root.mkdir(exist_ok=True)
        Image.frombytes("RGB", (640, 480), noise(640 * 480 * 3)).save(root / row["image"], quality=95)
        row |= {"width": 640, "height": 480}
    run = write_run(tmp_path / "run", rows)

    page = write_report(run, root=str(root))

    text = page.read_text(encoding="utf-8")
    assert len(CARD.findall(text)) == 60 and text.count("data:image/jpeg") == 60
    assert page.stat().st_size <= 2_000_000
    assert "clipped: 1,000,000 characters in all" in text


def test_500_noisy_images_fit(tmp_path: Path, root: Path) -> None:
    rows = [caption(f"{n}", "word " * 190, image="noise.jpg", width=420, height=420) for n in range(500)]
    root.mkdir()
    picture = Image.effect_noise((420, 420), 90).convert("RGB")
    picture.save(root / "noise.jpg", quality=95)

    page = write_report(write_run(tmp_path / "run", rows), root=str(root))

    assert page.read_text().count("data:image/jpeg") == 500
    assert 5_000_000 < page.stat().st_size <= MAX_BYTES


def test_a_missing_image_has_a_placeholder_and_is_counted(mixed: Path, root: Path) -> None:
    (root / "row-03.jpg").unlink()
    (root / "row-04.jpg").write_bytes(b"<html>not an image")

    page = write_report(mixed, root=str(root)).read_text()

    assert page.count("data:image/jpeg") == 10
    assert page.count("image not found") == 2
    assert "2 of the images could not be read" in page


def test_the_sample_is_the_same_however_the_rows_are_spread_over_files(tmp_path: Path) -> None:
    rows = [caption(f"row-{n}", f"number {n}") for n in range(300)]
    one = write_run(tmp_path / "one" / "run", rows)
    many = write_run(tmp_path / "many" / "run", rows[::-1], part_rows=7)

    first, second = (write_report(run, root=None, sample=20).read_text() for run in (one, many))

    assert first == second
    assert len(CARD.findall(first)) == 20


def test_another_seed_draws_another_sample(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [caption(f"row-{n}", f"number {n}") for n in range(300)])

    pages = [write_report(run, root=None, sample=20, seed=seed).read_text() for seed in (0, 1)]

    ids = [set(re.findall(r"row-\d+(?=</bdi>)", page)) for page in pages]
    assert len(ids[0]) == len(ids[1]) == 20 and ids[0] != ids[1]


def test_the_sample_is_drawn_evenly(tmp_path: Path) -> None:
    rows = [caption(f"row-{n:05}", "text", source="ab"[n >= 5_000]) for n in range(10_000)]
    page = write_report(write_run(tmp_path / "run", rows), root=None).read_text()

    first = len(re.findall(r'<li class="card" data-source="a"', page))
    assert 190 <= first <= 310  # 250 expected; five standard deviations are 56


@pytest.mark.parametrize(
    ("captions", "rejects", "expected"),
    [
        ([], [], ["No caption was written.", "No image was rejected.", "No caption to show."]),
        ([], [reject("a", "missing")], ["No caption was written.", "100.0%", "a is missing"]),
        ([caption("a", "text")], [], ["mean 4", "median 4", "1 of 1 shown", "No image was rejected."]),
    ],
)
def test_runs_with_next_to_nothing_have_a_report(
    tmp_path: Path, captions: list[dict[str, Any]], rejects: list[dict[str, Any]], expected: list[str]
) -> None:
    page = write_report(write_run(tmp_path / "run", captions, rejects), root=None).read_text()

    for text in expected:
        assert text in page


def test_rejects_show_examples_of_each_reason(tmp_path: Path) -> None:
    rejects = [reject(f"gone-{n}", "missing") for n in range(40)]
    rejects += [reject("loop", "repeated_phrase", stage="gate", message="<b>'a bus' 14 times</b>")]
    page = write_report(write_run(tmp_path / "run", [], rejects, part_rows=9), root=None).read_text()

    assert len(re.findall(r"gone-\d+ is missing", page)) == report.EXAMPLES
    assert "&lt;b&gt;&#39;a bus&#39; 14 times&lt;/b&gt;" in page
    assert page.index("missing") < page.index("repeated_phrase")


@pytest.mark.parametrize(
    ("model", "warns"), [("toy-captioner@1", True), ("fake@0", True), ("share-captioner@2", False)]
)
def test_only_a_toy_or_fake_model_is_called_a_stand_in(tmp_path: Path, model: str, warns: bool) -> None:
    page = write_report(write_run(tmp_path / "run", [caption("a", "b")], model=model), root=None).read_text()

    assert ("Stand-in." in page) == warns


def test_more_sources_than_a_table_holds_are_summed(tmp_path: Path) -> None:
    rows = [caption(f"{n}", "text", source=f"source-{n:03}") for n in range(100)]
    page = write_report(write_run(tmp_path / "run", rows), root=None).read_text()

    assert "61 more sources" in page


def test_a_sample_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^sample: 501 captions are too many: a report shows 0 to 500"):
        write_report(tmp_path, root=None, sample=501)


def test_a_failing_report_leaves_the_old_one(mixed: Path, root: Path) -> None:
    before = write_report(mixed, root=str(root)).read_bytes()
    summary = json.loads((mixed / "summary.json").read_text())
    del summary["tokens"]
    (mixed / "summary.json").write_text(json.dumps(summary))

    with pytest.raises(Exception, match="tokens"):
        write_report(mixed, root=str(root))
    assert (mixed / "report.html").read_bytes() == before
