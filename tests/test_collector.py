"""The garbage collector is paused for imports, and works again afterwards."""

import gc

import pytest

from sharegpt4v.collector import collector_paused


def test_the_collector_rests_and_goes_on_even_after_an_error() -> None:
    with pytest.raises(ImportError), collector_paused():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_what_was_imported_is_never_visited_again() -> None:
    with collector_paused():
        module = [[number] for number in range(1000)]
    assert gc.get_freeze_count() > 1000
    gc.unfreeze()
    del module


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
