"""Starts Ray on this machine without the parts that nobody asks for anything during one command.

The API server, the autoscaler's monitor and the log monitor are three Python processes that import Ray beside
those that the run waits for. Ray has no setting for them, so the methods that start them are replaced while
it starts; a Ray without these methods starts as it always does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private.node import Node

_NOT_NEEDED = ("start_api_server", "start_monitor", "start_log_monitor")


@contextmanager
def lean_head() -> Iterator[None]:
    """Leaves those parts out of a head that the block starts."""
    replaced = {name: getattr(Node, name) for name in _NOT_NEEDED if hasattr(Node, name)}
    for name in replaced:
        setattr(Node, name, _nothing)
    try:
        yield
    finally:
        for name, method in replaced.items():
            setattr(Node, name, method)


def _nothing(*_: Any, **__: Any) -> None:
    """Starts nothing."""
