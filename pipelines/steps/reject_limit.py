"""The share of rejects that stops a run, and with which it ends without success."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_JUDGEMENT = 50
"""Images from which on the share of rejects is judged."""

_DEVIATIONS = 3.0
"""By which rejects must exceed the limit to stop a run: where 3 % of all images are bad, one run in five has
three among its first fifty, and must not be stopped for more than 5 %."""

REPAIR = "put --root (or the images) right and run again with --retry-rejects"
REMEDY = f"{REPAIR}, or raise --max-reject-rate"


class RejectLimit:
    """Judges, under way, what this session has done together with what earlier ones did."""

    def __init__(self, max_reject_rate: float, captions: int = 0, rejects: int = 0) -> None:
        """Starts with the counts of earlier sessions."""
        self.stop: str | None = None
        """Why the run must end; it stays once it is set."""
        self._limit = max_reject_rate
        self._earlier = captions + rejects
        self._earlier_rejects = rejects

    def judge(self, captions: int, reasons: Mapping[str, int], example: str) -> None:
        """Sets `stop` once more images are rejects than the limit and chance allow.

        captions, reasons: of this session, rejects by reason. example: one of the rejects in words.
        """
        fresh = sum(reasons.values())
        done, rejects = self._earlier + captions + fresh, self._earlier_rejects + fresh
        if self.stop is None and done >= FIRST_JUDGEMENT and rejects > self._most(done):
            self.stop = (
                f"{rejects:,} of the first {done:,} images were rejected ({rejects / done:.1%}, "
                f"--max-reject-rate is {self._limit:.1%}), mostly as "
                f"{_commonest(reasons) or 'in earlier sessions'}{'; ' if example else ''}{example}"
            )

    def _most(self, done: int) -> float:
        """Rejects of `done` images that do not prove yet that the run's rate is above the limit."""
        return self._limit * done + _DEVIATIONS * math.sqrt(self._limit * (1 - self._limit) * done)


@dataclass(frozen=True, slots=True)
class Verdict:
    """On a run in which every image has its outcome. line: what to say of its rejects, if anything."""

    success: bool
    line: str | None = None


def judge_run(captions: int, by_reason: Mapping[str, int], max_reject_rate: float) -> Verdict:
    """Judges a whole run by its counts: exactly, and not at all by chance.

    A run without a caption is no success, whatever its size and limit; one above the limit is none from
    FIRST_JUDGEMENT images on, and always gets a line. by_reason: rejects by reason.
    """
    rejects = sum(by_reason.values())
    rows = captions + rejects
    worst = _commonest(by_reason)
    if not captions:
        line = f"no caption was written: all {rows:,} images were rejected, mostly as {worst}"
        return Verdict(False, f"{line}; no _SUCCESS: {REPAIR}")
    if rejects <= max_reject_rate * rows:
        return Verdict(True)
    line = (
        f"{rejects:,} of {rows:,} images were rejected ({rejects / rows:.1%}, --max-reject-rate is "
        f"{max_reject_rate:.1%}), mostly as {worst}"
    )
    if rows < FIRST_JUDGEMENT:
        return Verdict(True, f"{line}; with fewer than {FIRST_JUDGEMENT} images that is no failure")
    return Verdict(False, f"{line}; no _SUCCESS: {REMEDY}")


def _commonest(reasons: Mapping[str, int]) -> str | None:
    return max(reasons, key=lambda reason: reasons[reason], default=None)
