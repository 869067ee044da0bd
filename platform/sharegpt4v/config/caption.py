"""Configuration of `sharegpt4v caption`, and its presets."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sharegpt4v.config.base import (
    DECODING,
    GATE,
    MODEL,
    OUTPUT,
    RAY,
    TESTING,
    Bare,
    CommandConfig,
    Metavar,
    Preset,
)
from sharegpt4v.config.images import ImagesConfig
from sharegpt4v.dialogue import SAMPLING_BOUNDS, EngineName, ImageProtocol


class Gate(CommandConfig):
    """What a caption must be to be kept; see gate.py for the rules without a threshold."""

    min_characters: int = Field(20, ge=0, description="shorter captions are rejected as too_short")
    script: Literal["latin", "any"] = Field("latin", description="writing system captions are expected in")


def _sampling(name: str, default: float, description: str) -> Any:
    """Returns a field that becomes `name` of SamplingParams, within the same bounds."""
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
            raise ValueError(f"`max_new_tokens` is {cap}")
        return value


class Fake(CommandConfig):
    """The fake engine: no model, given speed, given faults. For trials of the pipeline alone."""

    # None is called as another engine's argument is (capacity, image_size): the command line would take an
    # error that names that argument for one about this field.
    image_side: int = Field(96, ge=1, description="pixels a side handed to the engine")
    seconds_per_request: float = Field(0.0, ge=0, description="time each caption takes, beside others")
    requests_at_once: int = Field(1024, ge=1, description="requests it holds in work at once")
    faults: dict[str, str] = Field(
        default_factory=dict, description="fault name to a regular expression over ids"
    )


class CaptionConfig(ImagesConfig):
    """Caption every image of a manifest, each exactly once."""

    presets = {
        "toy": Preset("the toy captioner that is shipped, on CPU", {"model": "toy"}),
        "7b": Preset(
            "Share-Captioner on GPUs, one actor a GPU; `model` must name its folder",
            {
                "model": "",
                "decoding": {"max_new_tokens": 500, "repetition_penalty": 1.5},
                "gate": {"min_characters": 60},
                "gpus_per_actor": 1.0,
                "cpus_per_actor": 2.0,
                # Planned for a card of 141 GB, not measured yet; the engine opens fewer slots where memory
                # holds fewer.
                "batch_size": 192,
            },
        ),
    }

    out: Annotated[Path, OUTPUT] = Field(
        description="run folder; the same command again does what is missing"
    )
    model: Annotated[str, MODEL, Metavar("PATH")] = Field(
        "toy",
        description="transformers folder of the captioner, its URI, or ORG/NAME[@REVISION] of the Hugging "
        "Face Hub; toy: the shipped one",
    )
    engine: Annotated[EngineName, MODEL] = Field(
        "torch",
        description="what runs the model; transformers: any vision-language model that it knows, slower; "
        "vllm: any that vLLM knows, an extra to install; fake: no model at all",
    )
    prompt: Annotated[str | None, MODEL] = Field(None, description="another prompt than the captioner's own")
    protocol: Annotated[ImageProtocol | None, MODEL] = Field(
        None, description="how images become square; default: the model's own"
    )
    max_pixels: Annotated[int | None, MODEL] = Field(
        None,
        ge=1,
        description="larger images are scaled down to so many pixels (models that take images of any shape: "
        "engine transformers, and vllm for other families than LLaVA and Share-Captioner)",
    )
    fast_decode: Annotated[bool, MODEL] = Field(
        False, description="JPEG scaled decoding: faster, slightly different pixels"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], MODEL] = Field(
        "auto",
        description="of the weights in memory; auto: bfloat16 on GPUs and on CPUs with matrix units for it "
        "(AMX, of the driver's machine), float32 on others and for toy models on CPUs; a resumed run keeps "
        "its own",
    )
    kv_dtype: Annotated[Literal["auto", "fp8"], MODEL] = Field(
        "auto",
        description="of keys and values in the slots; auto: as dtype, fp8: half the memory and a faster step "
        "on a GPU, and slightly other captions (torch engine only)",
    )
    batch_size: Annotated[int, MODEL] = Field(
        32, ge=1, description="slots of the engine, per actor: images captioned at once"
    )
    decoding: Annotated[Decoding, DECODING] = Field(default_factory=Decoding)
    gate: Annotated[Gate, GATE] = Field(default_factory=Gate)
    max_reject_rate: Annotated[float, GATE] = Field(
        0.05,
        ge=0,
        le=1,
        description="share of rejects above which a run stops, or ends with exit code 1 and no _SUCCESS; "
        "judged from the 50th image on",
    )
    retry_rejects: Annotated[str | None, OUTPUT, Metavar("REASON"), Bare("all")] = Field(
        None, description="try rejected images again: those with this reason, without a value all"
    )
    rows_per_commit: Annotated[int | None, OUTPUT] = Field(
        None,
        ge=1,
        description="images written as one file; a kill costs the few files under way; default: by size",
    )
    actors: Annotated[str, RAY, Metavar("N")] = Field(
        "auto",
        description="captioner actors: N, or MIN:MAX for an elastic pool; auto: one a GPU, otherwise 2, "
        "1 for a few toy captions",
    )
    gpus_per_actor: Annotated[float, RAY] = Field(
        0.0, ge=0, description="GPUs each actor holds; 0 runs on CPU"
    )
    cpus_per_actor: Annotated[float, RAY] = Field(
        0.5, gt=0, description="CPUs each actor reserves (a fraction leaves some for decoding)"
    )
    threads_per_actor: Annotated[int, RAY] = Field(
        1, ge=1, description="CPU threads the model uses in each actor"
    )
    hang_seconds: Annotated[float, RAY] = Field(
        600.0, gt=0, description="an engine that makes no token for so long is taken for hung and replaced"
    )
    address: Annotated[str | None, RAY, Metavar("HOST:PORT")] = Field(
        None, description="Ray cluster to run on; default: start one on this machine"
    )
    fake: Annotated[Fake, TESTING] = Field(default_factory=Fake)

    @field_validator("actors")
    @classmethod
    def _actors(cls, value: str) -> str:
        parts = value.split(":")
        if value != "auto" and not (len(parts) <= 2 and all(p.isdigit() and int(p) > 0 for p in parts)):
            raise ValueError("expected auto, a number such as 2, or MIN:MAX such as 1:8")
        if len(parts) == 2 and int(parts[0]) > int(parts[1]):
            raise ValueError(f"the smaller number comes first: {parts[1]}:{parts[0]}")
        return value
