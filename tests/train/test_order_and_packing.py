"""Which samples a step takes, and how they are spread over workers."""

import numpy as np
import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.train.order import SampleOrder
from sharegpt4v.train.packing import plan_padded, plan_step


def order(counts: list[int], weights: list[float], seed: int = 0, batch: int = 7) -> SampleOrder:
    return SampleOrder(counts, weights, seed, batch)


def test_an_epoch_takes_each_sample_once_and_another_epoch_another_order() -> None:
    one = order([50, 20], [1, 1])
    epochs = [np.concatenate([one.step(s) for s in range(e * 10, e * 10 + 10)]) for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(70))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_position_in_the_data_is_the_step() -> None:
    """A fresh object that begins at any step gives what one that ran through gives."""
    through = order([23], [1.0])
    steps = [through.step(s).tolist() for s in range(12)]
    assert order([23], [1.0]).step(11).tolist() == steps[11]
    assert order([23], [1.0], seed=1).step(0).tolist() != steps[0]
    # 23 is no multiple of 7: the fourth step is filled from the second epoch.
    assert sorted(np.concatenate(steps).tolist()[:23]) == list(range(23))
    assert through.steps(1) == 4 and through.steps(2) == 7


def test_weights_take_a_share_drawn_anew_each_epoch() -> None:
    one = order([40, 10], [0.5, 2], batch=40)
    assert one.epoch_size == 40
    first, second = one.step(0), one.step(1)
    for epoch in (first, second):
        assert len(set(epoch[epoch < 40])) == 20
        assert sorted(epoch[epoch >= 40]) == sorted(2 * list(range(40, 50)))
    assert set(first[first < 40]) != set(second[second < 40])


def lengths_of_a_mix(count: int) -> list[int]:
    """Many short answers and some long dialogues, with an image of 576 tokens in most."""
    rng = np.random.default_rng(0)
    return [int(n) for n in np.clip(600 + rng.exponential(150, count), 40, 2048)]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_sample_is_in_one_row_and_every_worker_has_as_many_rows(workers: int) -> None:
    lengths = lengths_of_a_mix(128)
    plan = plan_step(lengths, workers, budget=4096)
    assert {len(rows) for rows in plan.rows} == {plan.micro_steps}
    placed = [sample for rows in plan.rows for row in rows for sample in row]
    assert sorted(placed) == list(range(128))
    assert max(sum(lengths[i] for i in row) for rows in plan.rows for row in rows) <= 4096


@pytest.mark.parametrize(("workers", "balance"), [(1, 1.0), (2, 0.99), (8, 0.95), (16, 0.9)])
def test_workers_hardly_wait_for_each_other(workers: int, balance: float) -> None:
    assert plan_step(lengths_of_a_mix(128), workers, budget=8192).balance >= balance


def test_a_plan_is_the_same_wherever_it_is_made() -> None:
    lengths = lengths_of_a_mix(64)
    assert plan_step(lengths, 4, 4096) == plan_step(list(lengths), 4, 4096)


def test_samples_that_fill_rows_alone_leave_one_empty() -> None:
    plan = plan_step([10, 10, 10], workers=2, budget=10)
    assert plan.micro_steps == 2
    assert sorted(len(row) for rows in plan.rows for row in rows) == [0, 1, 1, 1]


def test_fewer_samples_than_workers_and_samples_over_the_budget_are_refused() -> None:
    with pytest.raises(UserError, match="^batch_size: 2 is refused: 3 workers"):
        plan_step([5, 5], workers=3, budget=10)
    with pytest.raises(UserError, match="^tokens_per_micro_step: 10 is refused: a sample has 11 tokens"):
        plan_step([11, 5], workers=1, budget=10)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_padded_rows_hold_one_modality_and_keep_to_the_budget(workers: int) -> None:
    lengths = lengths_of_a_mix(128)
    pictured = [number % 7 != 0 for number in range(128)]
    plan = plan_padded(lengths, pictured, workers, budget=4096)
    rows = [row for worker in plan.rows for row in worker]
    assert {len(worker) for worker in plan.rows} == {plan.micro_steps}
    assert sorted(sample for row in rows for sample in row) == list(range(128))
    assert all(len({pictured[sample] for sample in row}) == 1 for row in rows if row)
    padded = [max(lengths[sample] for sample in row) * len(row) for row in rows if row]
    assert max(padded) <= 4096
    # Measured: 1.02; rows of five samples in random order take 1.28.
    assert sum(padded) < 1.05 * sum(lengths)


def test_padded_rows_are_split_until_every_worker_has_as_many() -> None:
    plan = plan_padded([9, 9, 9, 9, 5], [True] * 4 + [False], workers=4, budget=100)
    assert sorted(len(worker[0]) for worker in plan.rows) == [1, 1, 1, 2]
    plan = plan_padded([9, 9, 5], [True, True, False], workers=2, budget=9)
    assert sorted(len(row) for worker in plan.rows for row in worker) == [0, 1, 1, 1]
    with pytest.raises(UserError, match="^tokens_per_micro_step: 10 is refused: a sample has 11 tokens"):
        plan_padded([11, 5], [True, True], workers=1, budget=10)
