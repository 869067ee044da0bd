import numpy as np
import pyarrow as pa
import pytest

from sharegpt4v.manifest import IdSet, ids


def test_add_is_true_at_the_first_of_equal_ids() -> None:
    held = IdSet()
    assert held.add(pa.array(["b", "a", "b", "c", "a"])).tolist() == [True, True, False, True, False]
    assert held.add(pa.array(["c", "d"])).tolist() == [False, True]
    assert len(held) == 4


def test_contains_answers_in_the_order_asked() -> None:
    held = IdSet([pa.array(["x", "y"]), pa.chunked_array([["z"], ["x"]])])
    assert held.contains(pa.array(["z", "q", "x", "q", "y"])).tolist() == [True, False, True, False, True]
    assert len(held) == 3


def test_agrees_with_a_python_set_over_many_merged_runs() -> None:
    random = np.random.default_rng(0)
    held, plain = IdSet(), set[str]()
    for _ in range(40):
        column = [f"image {n}" for n in random.integers(0, 3000, 97)]
        expected = [name not in plain and name not in column[:at] for at, name in enumerate(column)]
        assert held.add(pa.array(column)).tolist() == expected
        plain.update(column)
    everything = [f"image {n}" for n in range(3000)]
    assert held.contains(pa.array(everything)).tolist() == [name in plain for name in everything]
    assert len(held) == len(plain)


def test_an_id_is_merged_and_searched_a_logarithmic_number_of_times() -> None:
    """Counted instead of timed: with runs that are not merged every search is slower than the last."""
    held = IdSet()
    for start in range(0, 1 << 20, 1 << 12):
        held.add(pa.array(np.arange(start, start + (1 << 12)).astype(str)))
    sizes = [len(high) for high, _ in held._runs]
    assert sum(sizes) == 1 << 20
    assert all(longer > 2 * shorter for longer, shorter in zip(sizes, sizes[1:], strict=False))


def test_reads_slices_and_large_strings_as_they_are() -> None:
    column = pa.array(["a", "bb", "", "ccc"])
    held = IdSet([column.slice(1, 2)])
    assert held.contains(column).tolist() == [False, True, True, False]
    assert held.contains(column.cast(pa.large_string()).slice(2)).tolist() == [True, False]


def test_ids_that_share_their_high_words_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # A collision in the first 64 bits cannot be found in reasonable time, so the digests are given.
    words = {"a": (7, 3), "b": (7, 1), "c": (7, 2), "d": (7, 9)}

    def digests(column: pa.Array) -> tuple[ids.Digests, ids.Digests]:
        pairs = np.array([words[name] for name in column.to_pylist()], np.uint64)
        return pairs[:, 0], pairs[:, 1]

    monkeypatch.setattr(ids, "_digests", digests)
    held = IdSet.of(["a", "b", "c"])
    assert held.contains(pa.array(["c", "d", "a", "b"])).tolist() == [True, False, True, True]


def test_an_empty_set_and_an_empty_question() -> None:
    assert IdSet().contains(pa.array(["a"])).tolist() == [False]
    assert IdSet.of(["a"]).contains(pa.array([], pa.string())).tolist() == []


def test_nulls_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        IdSet([pa.array(["a", None])])
