"""Excludes objects that exist as long as their process from Python's cyclic garbage collection."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the collector during imports and excludes the objects that exist then from later collections.

    Each full collection visits every object: of the 3.8 s in which torch and transformers are imported
    0.6 s are collections that find nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
