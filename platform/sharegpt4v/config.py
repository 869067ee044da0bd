"""Configurations, one frozen model per stage, and the presets that fill them.

Importable without torch or Ray. Flags of the command line ARE these fields (dotted for nested ones); an
unknown key is an error that names the nearest valid one.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from sharegpt4v.errors import UserError

ImageProtocol = Literal["pad", "crop", "squash"]


class Stage(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(Stage):
    """What a caption must be to be kept; see gate.py for the rules without a threshold."""

    min_characters: int = Field(20, ge=0, description="shorter captions are rejected as too_short")
    script: Literal["latin", "any"] = Field("latin", description="writing system captions are expected in")


class Decoding(Stage):
    """How captions are generated. Greedy by default, so that a rerun gives the same text."""

    max_new_tokens: int = Field(500, ge=1, description="length cap in tokens (release: 500)")
    min_new_tokens: int = Field(0, ge=0, description="no caption ends before so many tokens")
    temperature: float = Field(0.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling share when temperature > 0")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="over generated tokens only")
    retry_temperature: float = Field(0.7, gt=0, le=100, description="of the one retry after the gate refused")
    retry_top_p: float = Field(0.9, gt=0, le=1, description="nucleus sampling share of the retry")

    @field_validator("min_new_tokens")
    @classmethod
    def _below_the_cap(cls, value: int, info: ValidationInfo) -> int:
        cap = info.data.get("max_new_tokens", value)  # absent where it was refused itself
        if value > cap:
            raise ValueError(f"--decoding.max-new-tokens is {cap}")
        return value


class Fake(Stage):
    """The fake engine: no model, given speed, given faults. For trials of the pipeline alone."""

    image_size: int = Field(96, ge=1, description="pixels a side handed to the engine")
    seconds_per_request: float = Field(0.0, ge=0, description="time each caption takes")
    capacity: int = Field(1024, ge=1, description="requests it holds in work at once")
    faults: dict[str, str] = Field(
        default_factory=dict, description="fault name to a regular expression over ids, as JSON"
    )


class CaptionConfig(Stage):
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
    limit: int | None = Field(None, ge=1, description="only the first N images, for a first look")
    dedupe_image: bool = Field(False, description="take each image of a conversation file once")
    max_reject_rate: float = Field(
        0.05, ge=0, le=1, description="share of rejects that stops the run, judged from the 1,000th image on"
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


class CheckConfig(Stage):
    """`sharegpt4v check`: look at every image of a manifest without a model."""

    images: str = Field(description="folder of images or manifest, as for caption")
    out: Path | None = Field(
        None, description="folder for rejects/ and summary.json; default: nothing is written"
    )
    root: str | None = Field(None, description="where the manifest's image paths start; default: its folder")
    limit: int | None = Field(None, ge=1, description="only the first N images")
    dedupe_image: bool = Field(False, description="take each image of a conversation file once")
    strict: bool = Field(
        False, description="exit code 1 when any image is missing, broken, oversized or a duplicate"
    )
    address: str | None = Field(None, description="Ray cluster to run on; default: start one on this machine")


class ExportConfig(Stage):
    """`sharegpt4v export`: hand a finished run on in a format other tools read."""

    run: Path = Field(description="finished run folder")
    format: Literal["llava-json", "hf", "webdataset"] = Field(description="what to write")
    out: Path | None = Field(None, description="file or folder to write; default: beside the run")
    root: str | None = Field(None, description="where the images are now; default: where the run read them")


class ConvertConfig(Stage):
    """`sharegpt4v convert`: a released checkpoint into one that others load, and LLaVA's back again."""

    checkpoint: Path = Field(
        description="released ShareGPT4V, LLaVA-1.5 or Share-Captioner, or a transformers LLaVA folder"
    )
    out: Path = Field(description="folder to write; it must be new or empty")
    to: Literal["transformers", "released"] = Field(
        "transformers", description="layout to write; released is for LLaVA alone"
    )
    vision_tower: Path | None = Field(
        None, description="CLIPVisionModel folder of a released checkpoint that comes without its tower"
    )
    tokenizer: Path | None = Field(
        None, description="folder with tokenizer.json or tokenizer.model; default: the checkpoint's"
    )
    shard_gb: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="size of an output file at most, in 10^9 bytes"
    )


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

S = TypeVar("S", bound=Stage)


def resolve(stage: type[S], *layers: Mapping[str, Any]) -> S:
    """The configuration from layers of increasing weight: preset, file, flags. Nested keys merge.

    Raises UserError, one line, for an unknown key (with the nearest valid one) or a value out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    _refuse_unknown(stage, merged, "")
    try:
        return stage.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{key} is missing: give --{key.replace('_', '-')}") from None
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{key} = {first['input']!r} is refused: {reason}") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """A configuration file. Raises UserError when it is missing, not YAML, or not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected keys and values")
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _refuse_unknown(stage: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        if key not in stage.model_fields:
            near = difflib.get_close_matches(str(key), stage.model_fields, n=1, cutoff=0.5)
            hint = (
                f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(stage.model_fields)}"
            )
            raise UserError(f"unknown key {prefix}{key}{hint}")
        nested = stage.model_fields[key].annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel) and isinstance(value, Mapping):
            _refuse_unknown(nested, value, f"{prefix}{key}.")
