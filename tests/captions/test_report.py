"""report.html: what its figures say, and what it may hold. tests/captions/test_report_browser.py opens it."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sharegpt4v.captions import report
from sharegpt4v.captions.report import write_report
from sharegpt4v.errors import UserError
from tests.captions.fake_run import caption, reject, write_images, write_run

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)> \u202ekcab\u0000 </p></ul>\"'{{ 7*7 }}"
)
CARD = re.compile(r'<li class="card[^>]*data-order[^>]*>')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def mixed(tmp_path: Path, root: Path) -> Path:
    rows = [caption(f"row-{n:02}", f"A green bus, number {n}.") for n in range(12)]
    write_images(root, rows)
    return write_run(tmp_path / "run", rows, [reject("gone", "missing")])


def written(run: Path, **options: Any) -> str:
    return write_report(run, root=options.pop("root", None), **options).read_text(encoding="utf-8")


def flags(page: str) -> list[list[str]]:
    """The flags of each card of the gallery."""
    return [found.split() for found in re.findall(r'data-flags="([^"]*)"', page)]


def test_hostile_texts_are_escaped_everywhere(tmp_path: Path) -> None:
    fields = {"image": HOSTILE, "source": HOSTILE}
    run = write_run(
        tmp_path / "run",
        [caption(HOSTILE + str(n), HOSTILE * 5, **fields) for n in range(2)],
        [reject(HOSTILE, HOSTILE, stage="gate", message=HOSTILE, caption=HOSTILE, **fields)],
        settings={"prompt_text": HOSTILE * 20, "fingerprint": {HOSTILE: HOSTILE}},
        model=HOSTILE,
        prompt_id=HOSTILE,
    )
    page = written(run, root=None)

    assert page.count("<script") == page.count("</script>") == 1
    assert "<img src=x" not in page and "{{ 7*7 }}" in page and "\0" not in page
    links = re.findall(r'href="([^"]*)"', page)
    assert len(links) > 5 and all(re.fullmatch(r"data:,|#[\w=&;%./-]+", link) for link in links)


def test_the_page_loads_nothing_from_anywhere(mixed: Path, root: Path) -> None:
    page = written(mixed, root=str(root))

    targets = re.findall(r"""\b(?:src|href|action|poster|data)\s*=\s*["']?([^"'\s>]*)""", page)
    assert targets and all(
        target.startswith(("data:", "#")) for target in targets if "pictures" not in target
    )
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_the_page_stays_below_its_size_with_noise_and_endless_captions(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_BYTES", 900_000)
    monkeypatch.setattr(report, "PAGE_BYTES", 200_000)
    noise = random.Random(0).randbytes
    rows = [caption(f"{n}" + "<" * 400, f"{n}" + '"' * 1_000_000, image=f"{n}.jpg") for n in range(24)]
    for row in rows:
        root.mkdir(exist_ok=True)
        Image.frombytes("RGB", (640, 480), noise(640 * 480 * 3)).save(root / row["image"], quality=95)
        row |= {"width": 640, "height": 480}
    run = write_run(tmp_path / "run", rows)

    page = write_report(run, root=str(root))

    text = page.read_text(encoding="utf-8")
    assert len(CARD.findall(text)) == 24 and text.count("data:image/jpeg") == 24
    assert page.stat().st_size <= 900_000
    assert "clipped: 1,000,00" in text


def test_a_missing_image_has_a_placeholder_and_is_counted(mixed: Path, root: Path) -> None:
    (root / "row-03.jpg").unlink()
    (root / "row-04.jpg").write_bytes(b"<html>not an image")

    page = written(mixed, root=str(root))

    assert page.count("data:image/jpeg") == 10
    assert page.count("image not found") == 2
    assert "2 of the images could not be read" in page


def test_an_image_that_could_not_be_decoded_is_not_decoded_for_the_page(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejects = [
        reject("killer", "killed_worker", width=64, height=48),
        reject("refused", "refusal", stage="gate", caption="I cannot see it.", width=64, height=48),
    ]
    write_images(root, rejects)
    page = written(write_run(tmp_path / "run", [], rejects), root=str(root))

    assert page.count("data:image/jpeg") == page.count("could not be decoded") == 1
    assert "I cannot see it." in page and "could not be read" not in page


def test_the_sample_is_the_same_however_the_rows_are_spread_over_files(tmp_path: Path) -> None:
    rows = [caption(f"row-{n}", f"number {n}", attempt=int(n % 9 == 0)) for n in range(300)]
    rejects = [reject(f"gone-{n}", "missing" if n % 4 else "truncated") for n in range(150)]
    one = write_run(tmp_path / "one" / "run", rows, rejects)
    many = write_run(tmp_path / "many" / "run", rows[::-1], rejects[::-1], part_rows=7)

    first, second = (re.sub(r' data-place="\d+"', "", written(run, sample=20)) for run in (one, many))

    assert first == second
    assert sum("drawn" in names for names in flags(first)) == 20


def test_another_seed_draws_another_sample(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [caption(f"row-{n}", "the same length") for n in range(300)])

    pages = [written(run, sample=20, seed=seed) for seed in (0, 1)]

    ids = [set(re.findall(r"row-\d+(?=</bdi><span>)", page)) for page in pages]
    assert len(ids[0]) >= 20 and ids[0] != ids[1]


def test_the_retried_cut_and_rejected_are_shown_and_no_share_can_be_read_off_them(tmp_path: Path) -> None:
    rows = [caption(f"row-{n:04}", f"number {n:04}") for n in range(2_000)]
    rows[5]["attempt"] = rows[6]["attempt"] = 1
    rows[7]["finish_reason"] = "length"
    page = written(write_run(tmp_path / "run", rows, [reject("gone", "missing")]))

    found = flags(page)
    assert sum("retried" in names for names in found) == 2
    assert sum("cut" in names for names in found) == 1
    assert sum("rejected" in names for names in found) == 1
    assert sum("drawn" in names for names in found) == 400
    assert "Read no shares off this gallery" in page and "added: cut" in page
    assert re.search(r"Second attempt</dt><dd[^>]*>2<", page) and re.search(r"Cut</dt><dd[^>]*>1<", page)


def test_a_small_run_is_shown_whole_and_says_nothing_of_shares(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run", [caption("a", "text", attempt=1)]))

    assert "All captions." in page and "drawn evenly" not in page
    assert 'class="added"' not in page and "Read no shares" not in page


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
    page = written(write_run(tmp_path / "run", captions, rejects))

    for text in expected:
        assert text in page


def test_rejects_are_shown_with_stage_message_and_the_refused_text(tmp_path: Path) -> None:
    rejects = [reject("loop", "repetition", stage="gate", message="<b>14 times</b>", caption="a bus, a bus")]
    page = written(write_run(tmp_path / "run", [], rejects))

    card = page[page.index('data-reason="repetition"') :]
    for text in ("gate", "&lt;b&gt;14 times&lt;/b&gt;", "a bus, a bus"):
        assert text in card


@pytest.mark.parametrize(("prompt", "folded"), [("Describe.\nIn detail.", False), ("long " * 2_000, True)])
def test_the_prompt_is_there_whole(tmp_path: Path, prompt: str, folded: bool) -> None:
    settings = {"prompt_text": prompt}
    page = written(write_run(tmp_path / "run", [caption("a", "text")], settings=settings))

    assert f'<p class="prompt" dir="auto">{prompt}</p>' in page
    assert ('<summary class="prompt"' in page) == folded


def test_what_decided_the_captions_is_listed(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run", [caption("a", "text")]))

    settings = dict(re.findall(r'<dt>([^<]*)</dt><dd class="mono">([^<]*)</dd>', page))
    assert settings["decoding.max_new_tokens"] == "500" and settings["git revision"] == "0123456789ab"
    assert settings["torch"] == "2.11.0" and "vllm" not in settings  # it was not installed


@pytest.mark.parametrize(
    ("model", "warns"), [("toy-captioner@1", True), ("fake@0", True), ("share-captioner@2", False)]
)
def test_captions_of_a_toy_or_fake_model_stand_under_a_warning(
    tmp_path: Path, model: str, warns: bool
) -> None:
    page = written(write_run(tmp_path / "run", [caption("a", "b")], model=model))

    assert ("<h2>Stand-in captions</h2>" in page) == warns


def test_frequent_words_lead_to_their_captions(tmp_path: Path) -> None:
    rows = [caption("a", "The bus and the BUS & a tree."), caption("b", "A bus."), caption("c", "Nothing.")]
    page = written(write_run(tmp_path / "run", rows))

    words = re.findall(r'href="#q=([^"]*)".*?([\d.]+%)', page)
    assert words == [("bus", "66.7%"), ("nothing", "33.3%"), ("tree", "33.3%")]


def test_repeated_captions_are_counted_and_shown_with_their_images(tmp_path: Path, root: Path) -> None:
    rows = [caption(f"same-{n}", "A red bus stands at a stop.", image=f"{n}.jpg") for n in range(9)]
    rows += [caption(f"row-{n}", f"Caption {n} is like no other {n * n}.") for n in range(9)]
    write_images(root, rows)
    page = written(write_run(tmp_path / "run", rows), root=str(root))

    panel = page[page.index('id="repeats"') : page.index('id="gallery"')]
    assert "9 captions in 1 group" in panel and "captions with the same words" in panel
    assert panel.count("data:image/jpeg") == 4 and "same-0" in panel and "row-" not in panel


def test_more_sources_than_a_table_holds_are_summed(tmp_path: Path) -> None:
    rows = [caption(f"{n}", "text", source=f"source-{n:03}") for n in range(100)]
    page = written(write_run(tmp_path / "run", rows))

    assert "61 more sources" in page and "#source=61" not in page


def test_a_sample_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^sample: 401 captions are too many: a report shows 0 to 400"):
        write_report(tmp_path, root=None, sample=401)


def test_a_failing_report_leaves_the_old_one(mixed: Path, root: Path) -> None:
    before = write_report(mixed, root=str(root)).read_bytes()
    summary = json.loads((mixed / "summary.json").read_text())
    del summary["tokens"]
    (mixed / "summary.json").write_text(json.dumps(summary))

    with pytest.raises(Exception, match="tokens"):
        write_report(mixed, root=str(root))
    assert (mixed / "report.html").read_bytes() == before


def test_start_up_and_steady_rate_are_apart(tmp_path: Path) -> None:
    rows = [caption("a", "b")]
    page = write_report(write_run(tmp_path / "one", rows, images_per_second=58.12), root=None).read_text()
    assert '58.1</dd><dd class="note">after start-up' in page
    assert '12 s</dd><dd class="note">1 session, 4.5 s of it start-up</dd>' in page
    # One commit alone gives no rate, and a command that only finished had no start-up.
    small = write_run(tmp_path / "two", rows, images_per_second=0.0, startup_seconds=None, sessions=2)
    page = write_report(small, root=None).read_text()
    assert '–</dd><dd class="note">after start-up' in page and '<dd class="note">2 sessions</dd>' in page
