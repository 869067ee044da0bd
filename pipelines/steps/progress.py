"""Progress in images, not blocks: a bar on a terminal, a line every few seconds elsewhere."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

import ray.exceptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipelines.steps.ledger import Tally
from pipelines.steps.phases import Phases

_POLL_SECONDS = 0.5
_LINE_SECONDS = 5.0


class ProgressBar:
    """Context manager that polls `tally` from its own thread until it is left.

    Until the first image is done `phases` says what is going on. The rate is the one since then: with the
    start-up in it the time left would be wrong for minutes.
    """

    def __init__(
        self, verb: str, tally: Callable[[], Tally], total: int, done: int, phases: Phases, loaded: str = ""
    ) -> None:
        """Prepares the bar. verb: what is done to the images, captioned or checked. total: images of the run.

        done: those of earlier sessions, so that a resumed run starts there. loaded: the phase that begins
        with the first loaded engine.
        """
        self._verb = verb
        self._tally = tally
        self._total = total
        self._done = done
        self._phases = phases
        self._loaded = loaded
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._begun: tuple[float, int] | None = None  # when the first images were seen, and how many
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._spoken = 0.0

    def __enter__(self) -> "ProgressBar":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._bar:
            self._bar.stop()

    def _watch(self) -> None:
        while True:
            last = self._stop.wait(_POLL_SECONDS)
            try:
                tally = self._tally()
            except ray.exceptions.RayError:
                return  # Ray is going down; the main thread says why
            if tally.done:
                self._show(tally, last)
            elif tally.ready and self._loaded and not last:
                self._phases.begin(self._loaded)
                self._loaded = ""
            if last:
                return

    def _show(self, tally: Tally, last: bool) -> None:
        now, done = time.monotonic(), self._done + tally.done
        if self._begun is None:
            self._begun = now, tally.done
            self._phases.end()
            self._bar = _bar(self._verb)
            if self._bar:
                self._bar.start()
                self._task = self._bar.add_task("", total=self._total, completed=done, note="")
        note = ", ".join(self._notes(tally, now))
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif last or now - self._spoken >= _LINE_SECONDS:
            self._spoken = now
            line = f"{self._verb} {done:,} of {self._total:,}"
            self._phases.say(f"{line}, {note}" if note else line)

    def _notes(self, tally: Tally, now: float) -> list[str]:
        assert self._begun is not None
        since, first = self._begun
        fresh, left = tally.done - first, self._total - self._done - tally.done
        notes = []
        if fresh:
            rate = fresh / (now - since)
            notes.append(f"{rate:,.1f} images/s")
            if left and not self._bar:
                notes.append(f"about {left / rate:,.0f} s left")
        if tally.rejects:
            notes.append(f"{tally.rejects:,} rejected")
        if tally.put_off:
            notes.append(f"{tally.put_off:,} put off")
        if tally.deaths:
            notes.append(f"{tally.deaths} worker deaths")
        return notes


def _bar(verb: str) -> Progress | None:
    """Returns a bar, or None where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    return Progress(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
