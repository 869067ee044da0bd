"""A sample comes from every source, is the same every time, and grows into the whole manifest."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import normalise, read_rows
from sharegpt4v.manifest.sample import quotas
from tests.manifest.conftest import write_jsonl


def _manifest(folder: Path, **counts: int) -> str:
    """Sources one after the other, as folders are read."""
    rows = [f"{source}/{n:06}.jpg" for source, count in counts.items() for n in range(count)]
    return write_jsonl(folder / "m.jsonl", [{"image": image} for image in rows])


def _ids(folder: Path) -> list[str]:
    return [row["id"] for part in sorted(folder.glob("*.parquet")) for row in read_rows(str(part))]


@pytest.mark.parametrize(
    ("available", "rows", "expected"),
    [
        ({"a": 100, "b": 100}, 10, {"a": 5, "b": 5}),
        ({"a": 1, "b": 100, "c": 100}, 6, {"a": 1, "b": 3, "c": 2}),
        ({"a": 100, "b": 100, "c": 100}, 2, {"a": 1, "b": 1, "c": 0}),
        ({"a": 2, "b": 3}, 10, {"a": 2, "b": 3}),
    ],
)
def test_rows_are_shared_out_evenly(available: dict[str, int], rows: int, expected: dict[str, int]) -> None:
    assert quotas(available, rows) == expected


def test_a_share_never_grows_beyond_what_was_kept_while_other_sources_appear() -> None:
    # b and c grow past each other, then d appears: a share that grew would want rows that were dropped.
    history = [
        {"a": 1, "b": 100, "c": 101},
        {"a": 1, "b": 102, "c": 101},
        {"a": 2, "b": 102, "c": 103},
        {"a": 9, "b": 102, "c": 103, "d": 5},
    ]
    for before, after in pairwise(quotas(counts, 6) for counts in history):
        for source in ("b", "c"):
            assert after[source] <= before[source]


def test_every_source_is_in_the_sample_however_late_it_comes(tmp_path: Path, out: Path) -> None:
    path = _manifest(tmp_path, coco=30_000, sam=3, wikiart=20_000)
    assert normalise(path, None, out, sample=40).sources == {"coco": 19, "sam": 3, "wikiart": 18}


def test_a_larger_sample_holds_the_smaller_and_the_whole_holds_both(tmp_path: Path, out: Path) -> None:
    path = _manifest(tmp_path, coco=500, sam=300)
    normalise(path, None, out, sample=40)
    small = _ids(out)
    assert normalise(path, None, out, sample=40).added == 0
    assert normalise(path, None, out, sample=90).added == 50
    assert _ids(out)[:40] == small
    assert normalise(path, None, out).rows == 800
    assert max(Counter(_ids(out)).values()) == 1


def test_the_sample_is_the_same_for_any_batch_size_of_the_reader(tmp_path: Path, out: Path) -> None:
    lines = Path(_manifest(tmp_path, a=2_000, b=2_000)).read_text().splitlines()
    shuffled = tmp_path / "other.jsonl"
    shuffled.write_text("\n".join(sorted(lines, key=lambda line: line[::-1])))
    normalise(str(tmp_path / "m.jsonl"), None, out, sample=21)
    normalise(str(shuffled), None, out.with_name("other"), sample=21)
    assert sorted(_ids(out)) == sorted(_ids(out.with_name("other")))


def test_a_wrong_record_outside_the_sample_is_still_refused(tmp_path: Path, out: Path) -> None:
    path = _manifest(tmp_path, a=100)
    with open(path, "a") as file:
        file.write('{"image": "a/000007.jpg"}\n')
    with pytest.raises(UserError, match="1 of 101 ids repeat"):
        normalise(path, None, out, sample=5)


def test_limit_and_sample_together_are_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        normalise(_manifest(tmp_path, a=3), None, out, limit=1, sample=1)


def test_a_given_source_names_only_rows_that_name_none(tmp_path: Path, out: Path) -> None:
    rows = [{"image": "a/1.jpg"}, {"image": "coco/2.jpg"}, {"image": "a/3.jpg", "source": "sam"}]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    assert normalise(path, None, out, source="mine").sources == {"mine": 2, "sam": 1}


def test_a_sample_of_records_without_an_image_is_refused_as_the_whole_is(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "image": pa.array([None, None], pa.string())}), path)
    with pytest.raises(UserError, match="2 of 2 records have no image"):
        normalise(str(path), None, out, sample=3)
    with pytest.raises(UserError, match="none of its 2 records has an image"):
        normalise(str(path), None, out, sample=3, dedupe_image=True)
