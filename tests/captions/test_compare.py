"""Two runs side by side: what is refused, what is counted, which words are marked."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import compare
from sharegpt4v.captions.compare import write_comparison
from sharegpt4v.captions.overlap import Overlap
from sharegpt4v.captions.word_diff import word_diff
from sharegpt4v.errors import UserError
from tests.captions.fake_run import caption, reject, write_images, write_run


def _run(path: Path, texts: dict[str, str], rejects: list[str] | None = None, **options: Any) -> Path:
    rows = [caption(name, text, image_sha256=name) for name, text in texts.items()]
    return write_run(path, rows, [reject(name, "missing") for name in rejects or []], **options)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs in other orders and parts, with five ids in common, three of them captioned by both."""
    one = {"x": "only in the first", "a": "a red cup", "b": "a dog", "c": "same", "d": "kept by the first"}
    two = {"c": "same", "b": "a small dog", "a": "a red cup", "e": "kept by the second"}
    return (
        _run(tmp_path / "one", one, ["e", "f"], part_rows=2),
        _run(tmp_path / "two", two, ["d", "f", "y", "z"], settings={"git_revision": "fedcba"}),
    )


def test_images_are_joined_by_id(runs: tuple[Path, Path], tmp_path: Path) -> None:
    overlap = write_comparison(*runs, tmp_path / "page.html")

    assert overlap == Overlap(
        both=3, same_text=2, other_image=0, only_a=1, only_b=1, neither=1, a_alone=1, b_alone=2
    )
    page = (tmp_path / "page.html").read_text()
    assert sorted(re.findall(r'<bdi class="mono"[^>]*>([^<]*)<', page)) == ["a", "b", "c"]
    assert "<mark>small</mark>" in page


def test_settings_that_differ_are_listed_and_no_others(runs: tuple[Path, Path], tmp_path: Path) -> None:
    write_comparison(*runs, tmp_path / "page.html")
    table = (tmp_path / "page.html").read_text().partition('id="settings"')[2].partition("</section>")[0]

    assert re.findall(r"<td[^>]*>([^<]*)</td>", table) == ["git revision", "0123456789ab", "fedcba"]


def test_pictures_are_those_of_the_first_run(tmp_path: Path) -> None:
    rows = [caption("a", "a red cup"), caption("b", "a dog")]
    write_images(tmp_path / "images", rows)
    settings = {"root": str(tmp_path / "images")}
    one = write_run(tmp_path / "one", rows, settings=settings)
    two = write_run(tmp_path / "two", rows, settings={"root": "/gone"})

    write_comparison(one, two, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2


def test_the_same_ids_of_other_images_are_warned_about(tmp_path: Path) -> None:
    rows = [caption(f"{n}", f"text {n}", image_sha256=f"first {n}") for n in range(9)]
    others = [row | {"image_sha256": "second" if row["id"] < "4" else row["image_sha256"]} for row in rows]
    one, two = write_run(tmp_path / "one", rows), write_run(tmp_path / "two", others)

    assert write_comparison(one, two, tmp_path / "page.html").other_image == 4
    assert "Not the same images" in (tmp_path / "page.html").read_text()


def test_captions_of_a_stand_in_are_named_on_either_side(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", {"a": "text"}, model="share-captioner@1")
    two = _run(tmp_path / "two", {"a": "text"}, model="fake@0")
    write_comparison(one, two, tmp_path / "page.html")

    found = re.findall(r"<h2>Stand-in captions in (.)</h2>", (tmp_path / "page.html").read_text())
    assert found == ["B"]


def test_an_unfinished_run_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (runs[1] / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="two is not finished"):
        write_comparison(*runs, tmp_path / "page.html")
    with pytest.raises(UserError, match="is no run folder"):
        write_comparison(runs[0], tmp_path, tmp_path / "page.html")


def test_runs_without_a_common_caption_are_refused_with_their_counts(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", {"a": "x", "b": "y"}), _run(tmp_path / "two", {"c": "x"}, ["a"])
    with pytest.raises(UserError, match=r"no image that both captioned, by id \(2 and 1 captions\)"):
        write_comparison(one, two, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_hostile_captions_and_settings_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    one = _run(tmp_path / "one", {hostile: f"{hostile} a"}, settings={"fingerprint": {hostile: hostile}})
    two = _run(tmp_path / "two", {hostile: f"{hostile} b"})
    write_comparison(one, two, tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 1 and "<img src=x" not in page


def test_the_command_writes_beside_the_first_run_and_says_what_is_common(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--a", str(runs[0]), "--b", str(runs[1])]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "3 images were captioned by both, 2 of them with equal captions; 1 by A alone, 1 by B"
    )
    assert (runs[0].parent / "one-vs-two.html").exists()


@pytest.mark.parametrize(("out", "said"), [("page.txt", "ends in .html"), ("gone/page.html", "cannot write")])
def test_a_page_that_cannot_be_written_is_one_line(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, said: str
) -> None:
    code = compare.main(["--a", str(runs[0]), "--b", str(runs[1]), "--out", str(tmp_path / out)])
    line = capsys.readouterr().err
    assert code == 2 and said in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("a", "b", "left", "right"),
    [
        ("a red cup", "a blue cup", "a [red] cup", "a [blue] cup"),
        ("a cup", "a cup", "a cup", "a cup"),
        ("a  cup\non it", "a cup on it", "a  cup\non it", "a cup on it"),  # spaces are no difference
        ("", "new words", "", "[new words]"),
        ("one two", "", "[one two]", ""),
        ("a cup ", "a cup. ", "a [cup] ", "a [cup.] "),
    ],
)
def test_words_that_differ_are_marked_and_no_space_before_them(a: str, b: str, left: str, right: str) -> None:
    marked = [
        "".join(f"[{part.text}]" if part.changed else part.text for part in side)
        for side in word_diff(a, b)[:2]
    ]
    assert marked == [left, right]


def test_texts_without_a_word_in_common_differ_wholly_and_equal_ones_not_at_all() -> None:
    assert word_diff("one two", "three four")[2] == 1
    assert word_diff("one two", "one two")[2] == 0


def test_a_text_that_repeats_one_word_takes_no_minutes() -> None:
    assert word_diff("a " * 2_000, "a b " * 1_000)[2] > 0
