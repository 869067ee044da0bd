"""What a command is doing, one phase after the other, each with the seconds since the command began."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from sharegpt4v.credentials import without_credentials


class Phases:
    """Context manager. On a terminal the present phase is a line with a spinner and the running time; it, and
    elsewhere every phase as it begins, leaves one line on stderr.

    started: unix time at which the command began.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._line = ""  # of the present phase, until it has been left on the terminal

    def __enter__(self) -> "Phases":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.time() - self.started

    def begin(self, text: str) -> None:
        """Ends the present phase and begins another."""
        self.end()
        line = self.stamp(text)
        if not self._console.is_terminal:
            print(line, file=sys.stderr, flush=True)
            return
        self._line = line
        begun, spinner = time.monotonic(), Spinner("dots")

        def present() -> Spinner:
            spinner.update(text=Text(f"{line}, {time.monotonic() - begun:.0f} s"))
            return spinner

        # Redirecting would put back, at the end, a stderr that has been exchanged meanwhile.
        self._live = Live(
            get_renderable=present,
            console=self._console,
            transient=True,
            refresh_per_second=8,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def say(self, text: str) -> None:
        """Prints a line that belongs to the present phase."""
        line = self.stamp(text)
        if self._live:
            for left in filter(None, (self._line, line)):
                self._console.print(Text(left))
            self._line = ""
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the present phase; nothing moves on the terminal any more."""
        if self._live:
            self._live.stop()
            self._live = None
            if self._line:
                print(self._line, file=sys.stderr, flush=True)

    def stamp(self, text: str) -> str:
        return f"{self.seconds:5.1f} s  {without_credentials(text)}"
