"""Counts and rates of one engine, or sums over several."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started; seconds are those that its thread spent in the model."""

    requests: int = 0  # finished
    failed: int = 0
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
