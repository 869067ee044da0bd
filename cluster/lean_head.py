"""Starts Ray on this machine without the parts that nobody asks for anything during one command.

The API server, the autoscaler's monitor and the log monitor are three Python processes that import Ray beside
those that the run waits for. The node's agent, which Ray waits for, loads a web server that nobody calls,
unless Ray believes that its packages are missing. Ray has no settings for these, so the functions that decide
are replaced while it starts; a Ray without these functions starts as it always does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray._private.utils
from ray._private.node import Node

from cluster.replaced import replaced

_NOT_NEEDED = ("start_api_server", "start_monitor", "start_log_monitor")


@contextmanager
def lean_head() -> Iterator[None]:
    """Leaves those parts out of a head that the block starts."""
    with ExitStack() as stack:
        for name in _NOT_NEEDED:
            stack.enter_context(replaced(Node, name, _nothing))
        stack.enter_context(replaced(ray._private.utils, "get_dashboard_dependency_error", _no_web_server))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Starts nothing."""


def _no_web_server() -> ImportError:
    """Returns why the agent is to do without a web server, as Ray asks it."""
    return ImportError("not wanted on a machine that runs one command")
