"""An engine's own thread: step after step until its scheduler is closed, or Python ends."""

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.intake import UNFINISHED
from sharegpt4v.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

_SECONDS_TO_END = 60.0
"""Longest wait for the step in progress when Python ends; a hung device must not keep the process."""


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def run_until_closed(scheduler: Scheduler[Any], step: Callable[[], None]) -> None:
    """Calls `step` until the scheduler is closed. No request is left unfinished, even after an error.

    step: does the next unit of work, or waits for one. An error that it raises ends the engine. Python that
    ends without `close` closes the scheduler and waits for the step in progress.
    """
    why = UNFINISHED
    with _closed_at_exit(scheduler):
        try:
            while not scheduler.closed:
                step()
        except Exception as error:
            log.exception("the engine's thread ends")
            why = f"the engine ended: {one_line(error)}"
        finally:
            scheduler.abandon(why)


@contextmanager
def _closed_at_exit(scheduler: Scheduler[Any]) -> Iterator[None]:
    """Has Python close the scheduler and join this thread before it takes the interpreter down.

    A daemon thread that comes back from C++ code afterwards is unwound through it, which aborts the process.
    """
    end = partial(_end, scheduler, threading.current_thread(), os.getpid())
    atexit.register(end)
    try:
        yield
    finally:
        atexit.unregister(end)


def _end(scheduler: Scheduler[Any], thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:
        return  # a forked child has no such thread, and may have got its locks locked
    scheduler.close()
    thread.join(_SECONDS_TO_END)
    if thread.is_alive():
        log.error("%s did not end within %g s: the process may abort", thread.name, _SECONDS_TO_END)
