"""Progress in images, not blocks: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import ray.exceptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.steps.ledger import Tally

_POLL_SECONDS = 0.5
_LINE_SECONDS = 5.0


class ProgressBar:
    """Context manager that polls `tally` from its own thread until it is left.

    verb: what has been done to them, captioned or checked. total: images of the whole run.
    done: those of earlier sessions, so that a resumed run starts there.
    """

    def __init__(self, verb: str, tally: Callable[[], Tally], total: int, done: int) -> None:
        self._verb = verb
        self._tally = tally
        self._total = total
        self._done = done
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn(verb),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "ProgressBar":
        if self._bar:
            self._bar.start()
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
        task = self._bar.add_task("", total=self._total, completed=self._done, note="") if self._bar else None
        spoken = 0.0
        while True:
            last = self._stop.wait(_POLL_SECONDS)
            try:
                tally = self._tally()
            except ray.exceptions.RayError:
                return  # Ray is going down; the main thread says why
            done = self._done + tally.done
            note = self._note(tally)
            if self._bar and task is not None:
                self._bar.update(task, completed=done, note=note)
            elif last or time.monotonic() - spoken >= _LINE_SECONDS:
                spoken = time.monotonic()
                print(f"{self._verb} {done:,} of {self._total:,}, {note}", file=sys.stderr, flush=True)
            if last:
                return

    def _note(self, tally: Tally) -> str:
        elapsed = time.monotonic() - self._start
        fresh = tally.done
        rate = fresh / elapsed if elapsed else 0.0
        parts = [f"{rate:,.1f} images/s"]
        if rate and not self._bar:
            left = (self._total - self._done - fresh) / rate
            parts.append(f"about {left:,.0f} s left")
        if tally.rejects:
            parts.append(f"{tally.rejects:,} rejected")
        if tally.deaths:
            parts.append(f"{tally.deaths} worker deaths")
        return ", ".join(parts)
