"""A run that rejects too much of what it is given is stopped."""

from pipelines.steps.reject_limit import RejectLimit


def _stop(limit: RejectLimit, captions: int, reasons: dict[str, int], example: str = "") -> str | None:
    limit.judge(captions, reasons, example)
    return limit.stop


def test_the_reject_rate_is_judged_from_the_thousandth_image() -> None:
    limit = RejectLimit(0.05)
    assert _stop(limit, 0, {"missing": 999}) is None
    stop = _stop(limit, 0, {"missing": 990, "truncated": 10}, "a.jpg: it is not there")
    assert stop == (
        "1,000 of the first 1,000 images were rejected (100.0%, --max-reject-rate is 5.0%), "
        "mostly as missing; a.jpg: it is not there"
    )


def test_a_rate_at_the_limit_does_not_stop() -> None:
    assert _stop(RejectLimit(0.05), 950, {"missing": 50}) is None


def test_earlier_sessions_are_judged_together_with_this_one() -> None:
    assert _stop(RejectLimit(0.05, captions=5_000), 0, {"missing": 200}) is None
    stop = _stop(RejectLimit(0.05, captions=940, rejects=60), 1, {})
    assert stop is not None and "60 of the first 1,001" in stop and "mostly as in earlier sessions" in stop


def test_a_stop_stays() -> None:
    limit = RejectLimit(0.05)
    stop = _stop(limit, 0, {"missing": 1_000})
    assert stop is not None and _stop(limit, 99_000, {"missing": 1_000}) == stop
