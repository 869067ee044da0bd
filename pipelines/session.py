"""Connecting to Ray, and leaving it again however the work ends."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.data import DataContext

from sharegpt4v.errors import UserError
from sharegpt4v.flags import EXIT_INTERRUPTED

LEAVE_SECONDS = 8.0
"""After Ctrl-C the process is gone within this time, Ray's goodbye or not."""

_LOGICAL_CPUS = 4
"""Ray Data keeps a reader, decoders, actors and a writer going; with fewer slots they wait for each other."""


@contextmanager
def ray_session(address: str | None, runtime_env: dict[str, Any] | None = None) -> Iterator[None]:
    """A connection to `address`, or to RAY_ADDRESS inside a job, or to a cluster started here.

    runtime_env: what other nodes need to run our code; None inside a job, which brings its own.
    Raises UserError when the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    own: dict[str, Any] = {
        "num_cpus": max(_LOGICAL_CPUS, os.cpu_count() or 1),
        "include_dashboard": False,
    }
    # Ray's hint about a default of a coming release is of no use to our users.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    print("starting Ray on this machine" if local else f"connecting to Ray at {address}", file=sys.stderr)
    with _quiet_native_stderr():
        try:
            ray.init(
                address=address,
                runtime_env=None if local else runtime_env,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if local else {}),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"cannot reach Ray at {address}: {cause}") from None
        try:
            with _prompt_interrupts():
                yield
        finally:
            ray.shutdown()


def cluster_resource(name: str) -> float:
    """What all living nodes have of it together, `GPU` for example."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return float(sum(node["Resources"].get(name, 0) for node in nodes if node["Alive"]))


def quiet_data_context(no_progress_seconds: float) -> None:
    """Ray Data without its own bars (ours count images, not blocks), and with hangs turned into errors."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = no_progress_seconds


@contextmanager
def _quiet_native_stderr() -> Iterator[None]:
    """Keeps what Ray's C++ side writes to file descriptor 2 off the terminal; Python's stderr stays there.

    It warns, for one, about the constructor arguments of Ray Data's own actors. Nothing is lost: the same
    lines stand in Ray's session logs.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    python_stderr, sys.stderr = sys.stderr, os.fdopen(terminal, "w", buffering=1, closefd=False)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _prompt_interrupts() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, and bound the time that cleaning up may take.

    What was committed is safe however the process ends, so a slow goodbye is cut short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, lambda *_: os._exit(EXIT_INTERRUPTED))
        timer = threading.Timer(LEAVE_SECONDS, os._exit, args=(EXIT_INTERRUPTED,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
