"""The report's histogram of caption lengths, in data units and in the units of an SVG view box.

Plain functions from counts to coordinates, so that a test can check a bar without parsing a page.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 560.0, 200.0
"""Plot area of a chart, in view box units, axis labels excluded."""

BINS = 28
"""Bars of a histogram, at most: about as many as a phone can show."""


@dataclass(frozen=True)
class Tick:
    """One axis label: its place in view box units and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One histogram bar: `count` captions of low <= characters < high; the rest in view box units."""

    low: int
    high: int | None  # None for a last bar that also holds everything longer
    count: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Histogram:
    """Caption lengths in characters: exact statistics and the bars to draw."""

    total: int
    mean: float
    median: float
    p95: int
    longest: int
    bars: list[Bar]
    mean_x: float | None  # None beyond the axis, where a few very long captions put the mean
    median_x: float | None  # likewise, when the axis also suits another run
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def nice_step(span: float, steps: int) -> float:
    """Returns the smallest of 1, 2, 2.5, 5 times a power of ten that covers `span` in `steps` steps."""
    raw = span / steps
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


def ticks(top: float, scale: float, steps: int = 4) -> list[Tick]:
    """Returns ticks from zero to at most `top`, one data unit being `scale` view box units."""
    step = nice_step(top, steps)
    values = [i * step for i in range(int(top / step + 1e-9) + 1)]
    return [Tick(value * scale, f"{value:,.10g}") for value in values]


def upward(marks: list[Tick]) -> list[Tick]:
    """Returns the same ticks on a vertical axis, where the view box counts from the top."""
    return [Tick(HEIGHT - mark.at, mark.text) for mark in marks]


@dataclass(frozen=True)
class _Ranked:
    """Lengths in ascending order, the captions of each, and how many captions are no longer."""

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    ranks: npt.NDArray[np.int64]

    @classmethod
    def of(cls, lengths: Mapping[int, int]) -> "_Ranked":
        values = np.array(sorted(lengths), dtype=np.int64)
        counts = np.array([lengths[int(value)] for value in values], dtype=np.int64)
        return cls(values, counts, np.cumsum(counts))

    @property
    def total(self) -> int:
        return int(self.ranks[-1])

    def at(self, rank: float) -> int:
        return int(self.values[np.searchsorted(self.ranks, int(rank), side="right")])


def histogram(lengths: Mapping[int, int], beside: Mapping[int, int] | None = None) -> Histogram | None:
    """Returns bars for {characters: captions}; None when there is no caption.

    The axis ends near the 99.5th percentile: one caption of a megabyte must not flatten the rest. What
    is longer falls into the last bar, whose `high` is then None.
    beside: lengths of another run, which are drawn on the same axis; it then suits both.
    """
    if not lengths:
        return None
    ranked = _Ranked.of(lengths)
    axis = _Ranked.of(Counter(lengths) + Counter(beside)) if beside else ranked
    values, counts, total = ranked.values, ranked.counts, ranked.total
    usual = axis.at(0.995 * (axis.total - 1))
    step = max(1, round(nice_step(usual + 1, BINS)))
    bins = usual // step + 1
    high = np.bincount(np.minimum(values // step, bins - 1), weights=counts, minlength=bins).astype(int)
    mean = float((values * counts).sum() / total)
    middle = (ranked.at((total - 1) // 2) + ranked.at(total // 2)) / 2
    longest = int(values[-1])
    scale_x, scale_y = WIDTH / (bins * step), HEIGHT / int(high.max())
    return Histogram(
        total=total,
        mean=mean,
        median=middle,
        p95=ranked.at(0.95 * (total - 1)),
        longest=longest,
        bars=_bars(high.tolist(), step, overflow=longest >= bins * step),
        mean_x=mean * scale_x if mean < bins * step else None,
        median_x=middle * scale_x if middle < bins * step else None,
        x_ticks=ticks(bins * step, scale_x, steps=6),
        y_ticks=upward(ticks(int(high.max()), scale_y)),
    )


def _bars(counts: list[int], step: int, overflow: bool) -> list[Bar]:
    width, unit = WIDTH / len(counts), HEIGHT / max(counts)
    return [
        Bar(
            low=i * step,
            high=None if overflow and i == len(counts) - 1 else (i + 1) * step,
            count=count,
            x=i * width,
            y=HEIGHT - count * unit,
            width=width,
            height=count * unit,
        )
        for i, count in enumerate(counts)
    ]
