"""The report's throughput over time, drawn from the times at which blocks were committed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median

import numpy as np

from sharegpt4v.run.charts import HEIGHT, WIDTH, Tick, nice_step, ticks, upward

POINTS = 80
"""Points of the throughput line, at most."""

PAUSE_WIDTH = 14.0
"""View box units that the pause between two sessions takes, however long it was."""

UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
"""Names of time spans and their seconds, longest first."""

Commit = tuple[float, int]
"""Unix seconds and the rows that became durable then."""


@dataclass(frozen=True)
class Session:
    """One uninterrupted stretch of commits: `x,y x,y ...` of its line, in view box units."""

    x: float
    width: float
    line: str


@dataclass(frozen=True)
class Pause:
    """The pause between two sessions: where it is drawn and how long it was in seconds."""

    x: float
    width: float
    seconds: float


@dataclass(frozen=True)
class Throughput:
    """Images per second over running time; pauses between sessions are cut out and marked."""

    sessions: list[Session]
    pauses: list[Pause]
    peak: float  # images per second
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def stretches(commits: Sequence[Commit], sessions: int) -> list[list[Commit]]:
    """Splits the commits into at most `sessions` stretches, at the longest intervals.

    An interval is a pause only when it is also three times the usual one, because a session that ended
    before its first commit leaves no pause of its own.
    """
    ordered = sorted(commits)
    waits = [later[0] - earlier[0] for earlier, later in pairwise(ordered)]
    usual = median(waits) if waits else 0.0
    longest = sorted(range(len(waits)), key=lambda i: -waits[i])[: max(0, sessions - 1)]
    cuts = sorted(i + 1 for i in longest if waits[i] > 3 * usual)
    return [ordered[a:b] for a, b in pairwise([0, *cuts, len(ordered)]) if a < b]


def throughput(
    commits: Sequence[Commit], sessions: int = 1, started: float | None = None
) -> Throughput | None:
    """Returns the throughput line; None when nothing was committed.

    started: unix seconds at which the first session began. Where a later one began is not recorded: its
    first commit is taken to have needed the run's usual interval.
    """
    parts = stretches([commit for commit in commits if commit[1] > 0], sessions)
    if not parts:
        return None
    waits = [later[0] - earlier[0] for part in parts for earlier, later in pairwise(part)]
    usual = max(median(waits) if waits else 0.0, 0.1)
    starts = [part[0][0] - usual for part in parts]
    if started is not None and started < parts[0][0][0]:
        starts[0] = started
    active = [part[-1][0] - start for part, start in zip(parts, starts, strict=True)]
    share = [max(1, round(POINTS * seconds / sum(active))) for seconds in active]
    rates = [
        _rates(part, start, min(len(part), points))
        for part, start, points in zip(parts, starts, share, strict=True)
    ]
    peak = max(max(rate) for rate in rates)
    pause = min(PAUSE_WIDTH, 0.4 * WIDTH / len(parts))
    scale = (WIDTH - pause * (len(parts) - 1)) / sum(active)
    lefts = [seconds * scale + i * pause for i, seconds in enumerate(accumulate([0.0, *active[:-1]]))]
    return Throughput(
        sessions=[
            _session(rate, left, seconds * scale, HEIGHT / peak)
            for rate, left, seconds in zip(rates, lefts, active, strict=True)
        ],
        pauses=[
            Pause(left - pause, pause, max(0.0, start - before[-1][0]))
            for left, start, before in zip(lefts[1:], starts[1:], parts[:-1], strict=True)
        ],
        peak=peak,
        x_ticks=_time_ticks(active, scale, pause),
        y_ticks=upward(ticks(peak, HEIGHT / peak)),
    )


def duration(seconds: float) -> str:
    """Formats a length of time for people: `8.4 s`, `3 min 20 s`, `5 h 12 min`, `2 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    first = next(i for i, (_, size) in enumerate(UNITS) if whole >= size)
    (big, size), (small, part) = UNITS[first], UNITS[first + 1]
    rest = whole % size // part
    return f"{whole // size} {big} {rest} {small}" if rest else f"{whole // size} {big}"


def _rates(part: Sequence[Commit], start: float, points: int) -> list[float]:
    """Returns images per second in equal slices of time; a commit's rows spread over the time they took."""
    times = [start, *(time for time, _ in part)]
    done = list(accumulate([0, *(rows for _, rows in part)]))
    edges = np.linspace(start, times[-1], points + 1)
    rates: list[float] = (np.diff(np.interp(edges, times, done)) / np.diff(edges)).tolist()
    return rates


def _session(rates: list[float], left: float, width: float, unit: float) -> Session:
    """Places each rate at the middle of its slice; the first and last reach to the session's ends."""
    slice_width = width / len(rates)
    points = [(left + (i + 0.5) * slice_width, HEIGHT - rate * unit) for i, rate in enumerate(rates)]
    points = [(left, points[0][1]), *points, (left + width, points[-1][1])]
    return Session(left, width, " ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def _time_ticks(active: Sequence[float], scale: float, pause: float) -> list[Tick]:
    """Returns labels of running time; a label after k pauses is k pause widths further right."""
    total = sum(active)
    name, size = next(((n, s) for n, s in UNITS if total >= 2 * s), UNITS[-1])
    step = nice_step(total / size, 5)
    ends = list(accumulate(active))[:-1]
    values = [i * step for i in range(int(total / size / step + 1e-9) + 1)]
    return [
        Tick(v * size * scale + pause * sum(v * size >= end for end in ends), f"{v:.10g} {name}")
        for v in values
    ]
