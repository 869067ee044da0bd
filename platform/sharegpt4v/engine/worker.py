"""An engine's own thread: step after step until its scheduler is closed."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.intake import UNFINISHED
from sharegpt4v.engine.scheduler import Scheduler

log = logging.getLogger(__name__)


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def run_until_closed(scheduler: Scheduler[Any], step: Callable[[], None]) -> None:
    """Calls `step` until the scheduler is closed. No request is left unfinished, even after an error.

    step: does the next unit of work, or waits for one. An error that it raises ends the engine.
    """
    why = UNFINISHED
    try:
        while not scheduler.closed:
            step()
    except Exception as error:
        log.exception("the engine's thread ends")
        why = f"the engine ended: {one_line(error)}"
    finally:
        scheduler.abandon(why)
