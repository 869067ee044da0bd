"""Progress of an export in captions: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 5.0


class ExportProgress:
    """Context manager to call with the captions written so far and the captions there are."""

    def __init__(self) -> None:
        self._start = self._spoken = time.monotonic()
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn("exported"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._task = self._bar.add_task("", total=None, rate="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, rows: int) -> None:
        now = time.monotonic()
        rate = done / max(now - self._start, 1e-9)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=rows, rate=f"{rate:,.0f} captions/s")
        elif done and now - self._spoken >= _LINE_SECONDS:
            self._spoken = now
            left = (rows - done) / rate
            print(
                f"exported {done:,} of {rows:,}, {rate:,.0f} captions/s, about {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
