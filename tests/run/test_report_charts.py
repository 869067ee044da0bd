"""The numbers behind the report's charts."""

import pytest

from sharegpt4v.run.charts import HEIGHT, WIDTH, histogram
from sharegpt4v.run.timeline import duration, stretches, throughput


def test_every_caption_is_in_exactly_one_bar() -> None:
    lengths = {n: n % 7 + 1 for n in range(120, 1_700, 3)}
    drawn = histogram(lengths)

    assert drawn
    assert sum(bar.count for bar in drawn.bars) == drawn.total == sum(lengths.values())
    assert len(drawn.bars) <= 28
    for bar in drawn.bars:
        assert bar.count == sum(
            n
            for length, n in lengths.items()
            if bar.low <= length and (bar.high is None or length < bar.high)
        )
        assert bar.height == pytest.approx(HEIGHT * bar.count / max(b.count for b in drawn.bars))
    assert drawn.bars[-1].x + drawn.bars[-1].width == pytest.approx(WIDTH)


@pytest.mark.parametrize(
    ("lengths", "mean", "median", "p95"),
    [({5: 1}, 5, 5, 5), ({0: 1}, 0, 0, 0), ({1: 1, 2: 1}, 1.5, 1.5, 1), ({1: 3, 100: 1}, 25.75, 1, 1)],
)
def test_mean_and_median_are_exact(lengths: dict[int, int], mean: float, median: float, p95: int) -> None:
    drawn = histogram(lengths)

    assert drawn and (drawn.mean, drawn.median, drawn.p95) == (mean, median, p95)


def test_one_giant_does_not_flatten_the_rest() -> None:
    drawn = histogram({100: 500, 200: 500, 300: 500, 1_000_000: 1})

    assert drawn
    assert len([bar for bar in drawn.bars if bar.count]) == 3
    assert drawn.bars[-1].high is None and drawn.bars[-1].count == 501
    assert drawn.mean_x is None and drawn.longest == 1_000_000


def test_no_caption_means_no_histogram() -> None:
    assert histogram({}) is None


def test_two_runs_beside_each_other_have_one_axis() -> None:
    short, long = {100: 900, 110: 100}, {400: 10, 900: 10}
    one, other = histogram(short, long), histogram(long, short)

    assert one and other
    assert [(bar.low, bar.high) for bar in one.bars] == [(bar.low, bar.high) for bar in other.bars]
    assert one.x_ticks == other.x_ticks
    assert (sum(bar.count for bar in one.bars), sum(bar.count for bar in other.bars)) == (1_000, 20)


def test_a_mean_and_median_beyond_the_common_axis_are_not_drawn() -> None:
    drawn = histogram({50_000: 3}, {100: 10_000})

    assert drawn and drawn.mean_x is None and drawn.median_x is None
    assert drawn.bars[-1].count == 3


def test_steady_commits_draw_a_level_line() -> None:
    drawn = throughput([(1_000.0 + 10 * n, 50) for n in range(1, 21)], started=1_000.0)

    assert drawn and drawn.peak == pytest.approx(5.0)
    heights = {point.split(",")[1] for point in drawn.sessions[0].line.split()}
    assert heights == {"0.0"}
    assert drawn.x_ticks[0].text == "0 min" and not drawn.pauses


def test_a_resumed_run_has_its_pause_cut_out_and_measured() -> None:
    first = [(100.0 * n, 10) for n in range(1, 11)]
    second = [(1_000.0 + 36_000 + 100 * n, 10) for n in range(1, 6)]
    drawn = throughput(first + second, sessions=2, started=0.0)

    assert drawn and len(drawn.sessions) == 2
    assert [pause.seconds for pause in drawn.pauses] == [36_000.0]
    assert drawn.sessions[0].width == pytest.approx(2 * drawn.sessions[1].width)
    assert drawn.sessions[1].x + drawn.sessions[1].width == pytest.approx(WIDTH)


def test_a_slow_stretch_of_one_session_is_no_pause() -> None:
    commits = [(1.0, 5), (2.0, 5), (900.0, 5), (901.0, 5)]

    assert len(stretches(commits, sessions=1)) == 1
    assert len(stretches(commits, sessions=2)) == 2


def test_a_session_without_commits_leaves_no_pause() -> None:
    assert len(stretches([(float(n), 5) for n in range(10)], sessions=4)) == 1


def test_twenty_kills_still_fit_the_axis() -> None:
    commits = [(session * 500.0 + n, 8) for session in range(21) for n in range(4)]
    drawn = throughput(commits, sessions=21)

    assert drawn and len(drawn.sessions) == 21
    assert all(session.width > 0 for session in drawn.sessions)
    assert drawn.sessions[-1].x + drawn.sessions[-1].width == pytest.approx(WIDTH)


@pytest.mark.parametrize("commits", [[(5.0, 3)], [(5.0, 3), (5.0, 4)]])
def test_commits_of_one_moment_have_a_finite_rate(commits: list[tuple[float, int]]) -> None:
    drawn = throughput(commits)

    assert drawn and 0 < drawn.peak < 1_000


def test_no_commit_means_no_line() -> None:
    assert throughput([]) is None
    assert throughput([(1.0, 0)]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (8.41, "8.4 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (18_720, "5 h 12 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
