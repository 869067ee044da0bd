"""Configuration of `sharegpt4v caption`, and its presets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sharegpt4v.config.base import CommandConfig
from sharegpt4v.dialogue import SAMPLING_BOUNDS, ImageProtocol


class Gate(CommandConfig):
    """What a caption must be to be kept; see gate.py for the rules without a threshold."""

    min_characters: int = Field(20, ge=0, description="shorter captions are rejected as too_short")
    script: Literal["latin", "any"] = Field("latin", description="writing system captions are expected in")


def _sampling(name: str, default: float, description: str) -> Any:
    """A field that becomes `name` of SamplingParams, within the same bounds."""
    bounds = SAMPLING_BOUNDS[name]
    return Field(default, ge=bounds.least, gt=bounds.above, le=bounds.most, description=description)


class Decoding(CommandConfig):
    """How captions are generated. Greedy by default, so that a rerun gives the same text."""

    max_new_tokens: int = _sampling("max_new_tokens", 500, "length cap in tokens (release: 500)")
    min_new_tokens: int = _sampling("min_new_tokens", 0, "no caption ends before so many tokens")
    temperature: float = _sampling("temperature", 0.0, "0 is greedy")
    top_p: float = _sampling(
        "top_p",
        1.0,
        "nucleus sampling share when temperature > 0: above 0, 1 at most, as in transformers",
    )
    repetition_penalty: float = _sampling("repetition_penalty", 1.0, "over generated tokens only")
    retry_temperature: float = Field(
        0.7,
        gt=0,
        le=SAMPLING_BOUNDS["temperature"].most,
        description="of the one retry after the gate refused",
    )
    retry_top_p: float = _sampling("top_p", 0.9, "nucleus sampling share of the retry")

    @field_validator("min_new_tokens")
    @classmethod
    def _below_the_cap(cls, value: int, info: ValidationInfo) -> int:
        cap = info.data.get("max_new_tokens", value)  # absent where it was refused itself
        if value > cap:
            raise ValueError(f"--decoding.max-new-tokens is {cap}")
        return value


class Fake(CommandConfig):
    """The fake engine: no model, given speed, given faults. For trials of the pipeline alone."""

    image_size: int = Field(96, ge=1, description="pixels a side handed to the engine")
    seconds_per_request: float = Field(0.0, ge=0, description="time each caption takes")
    capacity: int = Field(1024, ge=1, description="requests it holds in work at once")
    faults: dict[str, str] = Field(
        default_factory=dict, description="fault name to a regular expression over ids, as JSON"
    )


class CaptionConfig(CommandConfig):
    """`sharegpt4v caption`: caption every image of a manifest, each exactly once."""

    images: str = Field(
        description="folder of images, or a manifest: JSON array, JSONL, Parquet, tar shards; local or URI"
    )
    out: Path = Field(description="run folder; the same command again does what is missing")
    root: str | None = Field(None, description="where the manifest's image paths start; default: its folder")
    model: str = Field(
        "toy", description="transformers folder of the captioner or its URI; toy: the shipped one"
    )
    engine: Literal["torch", "vllm", "fake"] = Field(
        "torch", description="what runs the model; vllm: an extra to install, fake: no model at all"
    )
    prompt: str | None = Field(None, description="another prompt than the captioner's own")
    protocol: ImageProtocol | None = Field(
        None, description="how images become square; default: the model's own"
    )
    fast_decode: bool = Field(False, description="JPEG scaled decoding: faster, slightly different pixels")
    decoding: Decoding = Field(default_factory=Decoding)
    gate: Gate = Field(default_factory=Gate)
    fake: Fake = Field(default_factory=Fake)
    actors: str = Field(
        "auto", description="captioner actors: N, or MIN:MAX for an elastic pool; auto: 2, or one a GPU"
    )
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs each actor holds; 0 runs on CPU")
    cpus_per_actor: float = Field(
        0.5, gt=0, description="CPUs each actor reserves (a fraction leaves some for decoding)"
    )
    threads_per_actor: int = Field(1, ge=1, description="CPU threads the model uses in each actor")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights in memory; auto: float32 on CPU, bfloat16 on GPU"
    )
    batch_size: int = Field(32, ge=1, description="slots of the engine, per actor: images captioned at once")
    rows_per_commit: int | None = Field(
        None,
        ge=1,
        description="images written as one file; a kill costs the few files under way; default: by size",
    )
    hang_seconds: float = Field(
        600.0, gt=0, description="an engine that makes no token for so long is taken for hung and replaced"
    )
    limit: int | None = Field(None, ge=1, description="only the first N images")
    sample: int | None = Field(
        None, ge=1, description="so many images spread evenly over all sources, for a first look"
    )
    source: str | None = Field(
        None, min_length=1, description="source of images that name none; default: their first folder"
    )
    dedupe_image: bool = Field(False, description="take each image of a conversation file once")
    max_reject_rate: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of rejects above which a run is stopped, or ends with exit code 1 and without "
        "_SUCCESS; judged from the 50th image on",
    )
    retry_rejects: str | None = Field(
        None, description="take rejected images up again: a reason code, or all (the flag alone)"
    )
    address: str | None = Field(None, description="Ray cluster to run on; default: start one on this machine")

    @field_validator("actors")
    @classmethod
    def _actors(cls, value: str) -> str:
        parts = value.split(":")
        if value != "auto" and not (len(parts) <= 2 and all(p.isdigit() and int(p) > 0 for p in parts)):
            raise ValueError("expected auto, a number such as 2, or MIN:MAX such as 1:8")
        if len(parts) == 2 and int(parts[0]) > int(parts[1]):
            raise ValueError(f"the smaller number comes first: {parts[1]}:{parts[0]}")
        return value


CAPTION_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The defaults, which suit any captioner on CPU; the toy one is what runs when no model is given.
    "toy": {"model": "toy"},
    # Share-Captioner on GPUs: one actor a GPU, the release's length cap and penalty (reference, 4).
    "7b": {
        "model": "",
        "decoding": {"max_new_tokens": 500, "repetition_penalty": 1.5},
        "gate": {"min_characters": 60},
        "gpus_per_actor": 1.0,
        "cpus_per_actor": 2.0,
        # Planned for a card of 141 GB, not measured yet; the engine opens fewer where memory holds fewer.
        "batch_size": 192,
    },
}
