"""Which rows of a run its report shows."""

from typing import Any

import pyarrow as pa

from sharegpt4v.captions.sample import CAPTION_CHARACTERS, MAX_REJECTS, CaptionSample, RejectSample, Row
from sharegpt4v.records import CAPTIONS, REJECTS
from tests.captions.fake_run import caption, reject


def _captions(rows: list[dict[str, Any]], size: int = 100, batch: int = 1_000, seed: int = 0) -> list[Row]:
    sample = CaptionSample(size, seed)
    for start in range(0, len(rows), batch):
        table = pa.Table.from_pylist(rows[start : start + batch], schema=CAPTIONS)
        sample.add(table.combine_chunks().to_batches()[0])
    return sample.rows()


def _rejects(rows: list[dict[str, Any]]) -> list[Row]:
    sample = RejectSample(0)
    for batch in pa.Table.from_pylist(rows, schema=REJECTS).to_batches(max_chunksize=700):
        sample.add(batch)
    return sample.rows()


def _named(rows: list[Row], draw: str) -> list[Row]:
    return [row for row in rows if draw in row["chosen"]]


def test_the_even_draw_is_even() -> None:
    rows = [caption(f"row-{n:05}", "text", source="ab"[n >= 5_000]) for n in range(10_000)]
    drawn = _named(_captions(rows, size=400), "drawn")

    assert len(drawn) == 400
    assert 150 <= sum(row["source"] == "a" for row in drawn) <= 250  # 200 expected, deviation 10


def test_rare_captions_are_added_until_there_are_enough_of_them() -> None:
    rows = [caption(f"row-{n:05}", f"number {n:05}") for n in range(5_000)]
    for row in rows[100:160]:
        row["attempt"] = 1
    rows[7]["finish_reason"] = "length"
    sampled = _captions(rows)

    assert len(_named(sampled, "retried")) == 40
    assert [row["id"] for row in _named(sampled, "cut")] == ["row-00007"]
    assert len({row["id"] for row in sampled}) == len(sampled)  # one in two draws is shown once


def test_frequent_ones_are_not_added_to_those_that_are_drawn_anyway() -> None:
    rows = [caption(f"row-{n:05}", "same", attempt=1, finish_reason="length") for n in range(5_000)]
    assert len(_captions(rows)) <= 120  # shortest and longest are ten each


def test_the_shortest_and_longest_of_all_are_shown() -> None:
    rows = [caption(f"row-{n:05}", "x" * (50 + n % 400)) for n in range(5_000)]
    rows[3]["caption"], rows[4]["caption"] = "x", "x" * 9_000
    sampled = {row["id"]: row for row in _captions(rows)}

    assert "shortest" in sampled["row-00003"]["chosen"] and sampled["row-00003"]["characters"] == 1
    assert "longest" in sampled["row-00004"]["chosen"] and sampled["row-00004"]["characters"] == 9_000
    assert len(sampled["row-00004"]["caption"]) == CAPTION_CHARACTERS


def test_the_order_is_random_and_fixed_by_the_seed() -> None:
    rows = [caption(f"row-{n:03}", "text") for n in range(50)]
    first, other = ([row["id"] for row in _captions(rows, seed=seed)] for seed in (0, 1))

    assert first == [row["id"] for row in _captions(rows[::-1], batch=7)]
    assert sorted(first) == sorted(other) and first != other and first != sorted(first)


def test_every_reason_is_among_the_rejects_shown() -> None:
    rows = [reject(f"gone-{n:04}", "missing") for n in range(3_000)]
    rows += [reject(f"cut-{n}", "truncated") for n in range(3)]
    rows += [reject(f"loop-{n:03}", "repetition", stage="gate", caption="a bus") for n in range(500)]
    shown = [row["reason"] for row in _rejects(rows)]

    assert len(shown) == MAX_REJECTS and shown.count("truncated") == 3
    assert abs(shown.count("missing") - shown.count("repetition")) <= 1


def test_a_reject_keeps_the_refused_text_or_has_none() -> None:
    rows = _rejects([reject("a", "refusal", caption="I cannot."), reject("b", "missing")])
    found = {row["id"]: (row["caption"], row["characters"]) for row in rows}
    assert found == {"a": ("I cannot.", 9), "b": (None, 0)}


def test_no_row_gives_no_sample() -> None:
    assert CaptionSample(10, 0).rows() == RejectSample(0).rows() == []
    assert _named(_captions([caption("a", "text")], size=0), "drawn") == []
