"""A run that rejects too much of what it is given is stopped."""

import pytest

from pipelines.steps.reject_limit import RejectLimit, Verdict, judge_run


def _stop(limit: RejectLimit, captions: int, reasons: dict[str, int], example: str = "") -> str | None:
    limit.judge(captions, reasons, example)
    return limit.stop


def test_the_reject_rate_is_judged_from_the_fiftieth_image() -> None:
    limit = RejectLimit(0.05)
    assert _stop(limit, 0, {"missing": 49}) is None
    stop = _stop(limit, 0, {"missing": 48, "truncated": 2}, "a.jpg: it is not there")
    assert stop == (
        "50 of the first 50 images were rejected (100.0%, --max-reject-rate is 5.0%), "
        "mostly as missing; a.jpg: it is not there"
    )


def test_what_may_be_chance_does_not_stop_a_long_run_at_its_begin() -> None:
    assert _stop(RejectLimit(0.05), 47, {"missing": 3}) is None
    assert _stop(RejectLimit(0.05), 40, {"missing": 10}) is not None
    assert _stop(RejectLimit(0.05), 945_000, {"missing": 55_000}) is not None


def test_a_rate_at_the_limit_does_not_stop() -> None:
    assert _stop(RejectLimit(0.05), 950, {"missing": 50}) is None
    assert _stop(RejectLimit(1.0), 0, {"missing": 1_000}) is None


def test_a_limit_of_zero_stops_at_one_reject() -> None:
    assert _stop(RejectLimit(0.0), 60, {}) is None
    assert _stop(RejectLimit(0.0), 60, {"missing": 1}) is not None


def test_earlier_sessions_are_judged_together_with_this_one() -> None:
    assert _stop(RejectLimit(0.05, captions=5_000), 0, {"missing": 200}) is None
    stop = _stop(RejectLimit(0.05, captions=900, rejects=100), 1, {})
    assert stop is not None and "100 of the first 1,001" in stop and "mostly as in earlier sessions" in stop


def test_a_stop_stays() -> None:
    limit = RejectLimit(0.05)
    stop = _stop(limit, 0, {"missing": 1_000})
    assert stop is not None and _stop(limit, 99_000, {"missing": 1_000}) == stop


@pytest.mark.parametrize("rows", [1, 20, 60])
@pytest.mark.parametrize("limit", [0.05, 1.0])
def test_a_run_without_a_caption_is_no_success_whatever_its_size_and_limit(rows: int, limit: float) -> None:
    verdict = judge_run(0, {"missing": rows}, limit)
    assert not verdict.success and verdict.line is not None
    assert f"all {rows} images were rejected, mostly as missing; no _SUCCESS" in verdict.line
    assert "--retry-rejects" in verdict.line


def test_a_run_above_the_limit_always_gets_a_line_and_is_no_success_from_the_fiftieth_image_on() -> None:
    few = judge_run(8, {"missing": 1, "truncated": 1}, 0.05)
    assert few.success and few.line is not None
    assert "2 of 10 images were rejected (20.0%, --max-reject-rate is 5.0%)" in few.line
    assert judge_run(46, {"missing": 3}, 0.05).success
    many = judge_run(47, {"missing": 3}, 0.05)  # exactly: what came by chance came
    assert not many.success and many.line is not None
    assert "3 of 50 images" in many.line and "no _SUCCESS" in many.line and "--retry-rejects" in many.line


def test_a_run_at_the_limit_is_a_success_without_a_word() -> None:
    assert judge_run(95, {"missing": 5}, 0.05) == Verdict(True)
    assert judge_run(1, {}, 0.0) == Verdict(True)
