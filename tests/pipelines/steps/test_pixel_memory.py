"""Memory is lent again once nothing refers to it, and not a moment earlier."""

import threading

import numpy as np
import pyarrow as pa
import pytest

from pipelines.steps.pixel_memory import pixel_memory

SHAPE = (3, 4, 4, 3)


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    array = pixel_memory(SHAPE)
    assert array.shape == SHAPE and array.dtype == np.uint8 and array.flags.writeable
    array[:] = 7
    del array
    smaller = pixel_memory((2, 4, 4, 3))
    assert (smaller == 7).all()  # fresh memory is zero
    del smaller
    assert pixel_memory((300, 4, 4, 3)).shape == (300, 4, 4, 3)


def test_a_worker_does_not_sit_on_a_batch_out_of_the_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.steps.pixel_memory._MOST_KEPT", 100)
    pixel_memory(SHAPE)[:] = 8
    assert not (pixel_memory(SHAPE) == 8).any()


def test_a_view_or_an_arrow_array_keeps_the_memory() -> None:
    for keep in (lambda array: array[1:2, :2], pa.FixedShapeTensorArray.from_numpy_ndarray):
        array = pixel_memory(SHAPE)
        array[:] = 7
        kept = keep(array)
        del array
        pixel_memory(SHAPE)[:] = 9
        pixel_memory(SHAPE)[:] = 9
        values = kept.to_numpy_ndarray() if isinstance(kept, pa.FixedShapeTensorArray) else kept
        assert (values == 7).all()


def test_threads_are_never_lent_the_same_memory() -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(500):
            array = pixel_memory(SHAPE)
            array[:] = value
            wrong.extend(array[array != value].tolist())

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
