"""Counts, rates and latencies of one engine, or sums over several."""

from bisect import bisect_left
from dataclasses import dataclass, field, fields

SECONDS_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0),
)
"""Upper bounds of a histogram's buckets; the last bucket, beyond them, has none."""


class Seconds:
    """A histogram of durations: `counts` by bucket of SECONDS_BOUNDS, and their `sum` in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS_BOUNDS, seconds)] += 1
        self.sum += seconds

    def copy(self) -> "Seconds":
        copied = Seconds()
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied


@dataclass(frozen=True, slots=True)
class Latencies:
    """What users wait for: from submit to the first token, and from each token to the next."""

    first_token: Seconds
    next_token: Seconds


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started; seconds are those that its thread spent in the model."""

    requests: int = 0  # finished
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    slot_steps: int = 0  # decode steps x slots
    live_steps: int = 0  # decode steps x slots that still generated
    begun: int = 0  # requests that have a first token
    ttft_seconds: float = 0.0  # from submit to first token, summed over `begun`
    slots: int = 0
    running: int = field(default=0, compare=False)
    queued: int = field(default=0, compare=False)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Adds two engines' counts; rates remain averages of one engine."""
        return EngineStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def slot_use(self) -> float:
        """The share of slots that generated, over all decode steps."""
        return self.live_steps / self.slot_steps if self.slot_steps else 0.0

    @property
    def mean_ttft(self) -> float:
        """Seconds from submit to the first token."""
        return self.ttft_seconds / self.begun if self.begun else 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second of prefilling."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second of decoding; the first token of each answer belongs to its prefill."""
        return self.live_steps / self.decode_seconds if self.decode_seconds else 0.0
