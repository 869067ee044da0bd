"""The share of rejects that stops a run."""

from collections.abc import Mapping

FIRST_JUDGEMENT = 1_000
"""Images after which the share of rejects is judged."""


class RejectLimit:
    """Judges what this session has done together with what earlier ones did."""

    def __init__(self, max_reject_rate: float, captions: int = 0, rejects: int = 0) -> None:
        """captions, rejects: of earlier sessions."""
        self.stop: str | None = None
        """Why the run must end; it stays once it is set."""
        self._limit = max_reject_rate
        self._earlier = captions + rejects
        self._earlier_rejects = rejects

    def judge(self, captions: int, reasons: Mapping[str, int], example: str) -> None:
        """Sets `stop` once too many images are rejects.

        captions, reasons: of this session, rejects by reason. example: one of the rejects in words.
        """
        fresh = sum(reasons.values())
        done, rejects = self._earlier + captions + fresh, self._earlier_rejects + fresh
        if self.stop is None and done >= FIRST_JUDGEMENT and rejects > self._limit * done:
            worst = max(reasons, key=lambda reason: reasons[reason], default="in earlier sessions")
            self.stop = (
                f"{rejects:,} of the first {done:,} images were rejected ({rejects / done:.1%}, "
                f"--max-reject-rate is {self._limit:.1%}), mostly as {worst}"
                f"{'; ' if example else ''}{example}"
            )
