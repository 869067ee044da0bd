"""Notices that Ray died under a running command, and sees to it that the command ends and says so.

Left to itself a driver waits a minute for a dead head, and then its process is ended without a word.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType

from cluster.errors import EXIT_INTERRUPTED, EXIT_PROBLEM
from sharegpt4v.errors import RunFailed

LEAVE_SECONDS = 8.0
"""After Ctrl-C, or once Ray is lost, the process ends within this time, whether Ray has shut down or not."""

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Service:
    """One process of Ray that the command cannot do without.

    patience: seconds it may be unreachable before it counts as lost. advice: what the user should do then.
    """

    name: str
    host: str
    port: int
    patience: float
    advice: str

    def answers(self) -> bool:
        """Returns whether the service accepts connections."""
        try:
            socket.create_connection((self.host, self.port), timeout=2 * _LOOK_SECONDS).close()
        except OSError:
            return False
        return True

    def loss(self) -> str:
        return f"{self.name} at {self.host}:{self.port} is gone: {self.advice}"


class BoundedExit:
    """Ends the process for good some seconds after the first cause to leave, however long cleaning up takes.

    What was committed is safe however the process ends, so a slow shutdown is cut short.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def arm(self, code: int, line: str) -> None:
        """Starts the timer; the first call counts. line: printed only when cleaning up takes too long."""
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(LEAVE_SECONDS, _exit, args=(code, line))
                self._timer.daemon = True
                self._timer.start()

    def disarm(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()


class Watchdog:
    """Context manager that looks at the services every second, from its own thread, until it is left.

    Raises RunFailed in the main thread, which it interrupts by SIGINT: nothing less ends a wait inside Ray.
    """

    def __init__(self, services: Sequence[Service], leave: BoundedExit) -> None:
        self._services = services
        self._leave = leave
        self._lost: Service | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if isinstance(error, Exception) and self._lost is None:
            # Ray's own error came first, and is about whatever it missed first.
            self._lost = next((service for service in self._services if not service.answers()), None)
        if error is not None and self._lost is not None:
            self._leave.arm(EXIT_PROBLEM, self._lost.loss())
            raise RunFailed(self._lost.loss()) from error

    def _watch(self) -> None:
        heard = dict.fromkeys(self._services, time.monotonic())
        while not self._stop.wait(_LOOK_SECONDS):
            for service in self._services:
                if service.answers():
                    heard[service] = time.monotonic()
                elif time.monotonic() - heard[service] > service.patience and not self._stop.is_set():
                    self._lost = service
                    self._leave.arm(EXIT_PROBLEM, service.loss())
                    main = threading.main_thread().ident
                    assert main is not None
                    signal.pthread_kill(main, signal.SIGINT)
                    return


@contextmanager
def prompt_interrupts() -> Iterator[BoundedExit]:
    """Makes SIGINT and SIGTERM raise KeyboardInterrupt, and bounds the time that cleaning up may take.

    No other thread than the main one can set signal handlers: in another one nothing changes.
    """
    leave = BoundedExit()
    if threading.current_thread() is not threading.main_thread():
        yield leave
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, lambda *_: os._exit(EXIT_INTERRUPTED))
        leave.arm(EXIT_INTERRUPTED, "")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield leave
    finally:
        leave.disarm()
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(code: int, line: str) -> None:
    if line:
        print(f"\nsharegpt4v: {line}", file=sys.stderr, flush=True)
    os._exit(code)
