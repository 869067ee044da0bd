"""Configuration of `sharegpt4v serve`, and its presets."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from sharegpt4v.config.base import (
    DECODING,
    GATE,
    LIMITS,
    MODEL,
    RAY,
    SERVER,
    TESTING,
    CommandConfig,
    Metavar,
    Preset,
)
from sharegpt4v.config.caption import Fake, Gate
from sharegpt4v.dialogue import EngineName

NONE = "none"
"""What a user gives for a model that is not to be served."""

MOST_IN_FLIGHT = 1_000_000
"""Requests at once. Ray Serve counts in 32 bits, and no machine has a socket for each of so many."""


class ServeLimits(CommandConfig):
    """What one request, one key and all of them together may take."""

    in_flight: int | None = Field(
        None,
        ge=1,
        le=MOST_IN_FLIGHT,
        description="requests in progress at once; further ones get 429; default: 4 a slot",
    )
    per_key: int = Field(0, ge=0, description="requests in progress of one key; 0: no limit")
    per_minute: int = Field(0, ge=0, description="new requests a minute of one key; 0: no limit")
    body_megabytes: float = Field(20.0, gt=0, description="largest body of a request")
    body_seconds: float = Field(30.0, gt=0, description="within which a body must have arrived")
    megapixels: float = Field(40.0, gt=0, description="largest image")
    images: int = Field(8, ge=0, description="images of one dialogue")
    batch: int = Field(64, ge=1, description="images of one request for captions")
    tokens: int = Field(2048, ge=1, description="longest answer")
    request_seconds: float = Field(300.0, gt=0, description="after which an unfinished answer fails")


class Captions(CommandConfig):
    """How captions are generated unless a request says otherwise; greedy, as `sharegpt4v caption`."""

    max_new_tokens: int = Field(500, ge=1, description="length cap in tokens (release: 500)")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="over generated tokens only")


class ServeConfig(CommandConfig):
    """Serve a captioner and a chat model behind an OpenAI-style API."""

    presets = {
        "toy": Preset("both toy models that are shipped, on CPU", {"captioner": "toy", "chat": "toy"}),
        "7b": Preset(
            "released models on GPUs, a replica a GPU; name the folders of one or both",
            {
                "captioner": NONE,
                "chat": NONE,
                "captions": {"max_new_tokens": 500, "repetition_penalty": 1.5},
                "gate": {"min_characters": 60},
                "gpus_per_replica": 1.0,
                "cpus_per_replica": 2.0,
                "slots": 64,
            },
        ),
    }

    captioner: Annotated[str, MODEL, Metavar("PATH")] = Field(
        "toy",
        description="transformers folder of the captioner or its URI; toy: the shipped one, none: no such",
    )
    chat: Annotated[str, MODEL, Metavar("PATH")] = Field("toy", description="the same of the chat model")
    captioner_name: Annotated[str | None, MODEL] = Field(
        None, min_length=1, description="what clients call the captioner; default: its folder's name"
    )
    chat_name: Annotated[str | None, MODEL] = Field(
        None, min_length=1, description="what clients call the chat model; default: its folder's name"
    )
    engine: Annotated[EngineName, MODEL] = Field("torch", description="what runs the models")
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], MODEL] = Field(
        "auto",
        description="of the weights in memory; auto: bfloat16 on GPUs and on CPUs with matrix units for it "
        "(AMX), float32 on others and for toy models on CPUs",
    )
    slots: Annotated[int, MODEL] = Field(
        8, ge=1, le=65536, description="requests that one replica computes at once"
    )
    max_context: Annotated[int | None, MODEL] = Field(
        None, ge=1, description="tokens of a dialogue and its answer together; default: the model's own"
    )
    captions: Annotated[Captions, DECODING] = Field(default_factory=Captions)
    gate: Annotated[Gate, GATE] = Field(default_factory=Gate)
    host: Annotated[str, SERVER] = Field(
        "127.0.0.1", description="address to listen on; another than this machine's own wants `api_keys`"
    )
    port: Annotated[int, SERVER] = Field(8000, ge=0, le=65535, description="port to listen on")
    api_keys: Annotated[Path | None, SERVER] = Field(
        None, description="file of NAME sha256:HEX lines, which `python -m serve.keys NAME` prints"
    )
    log_texts: Annotated[bool, SERVER] = Field(
        False, description="questions and answers in the log, too; images never"
    )
    drain_seconds: Annotated[float, SERVER] = Field(
        60.0, ge=0, description="how long answers in progress may take after SIGTERM"
    )
    hang_seconds: Annotated[float, SERVER] = Field(
        120.0, gt=0, description="an engine that makes no token for so long is taken for hung and replaced"
    )
    limits: Annotated[ServeLimits, LIMITS] = Field(default_factory=ServeLimits)
    without_ray: Annotated[bool, RAY] = Field(
        False, description="all in one process of this machine: starts faster, no second replica, no restart"
    )
    replicas: Annotated[str, RAY, Metavar("MIN:MAX")] = Field(
        "1", description="replicas of each model: N, or MIN:MAX to follow the load"
    )
    gpus_per_replica: Annotated[float, RAY] = Field(0.0, ge=0, description="GPUs of a replica; 0 runs on CPU")
    cpus_per_replica: Annotated[float, RAY] = Field(0.5, gt=0, description="CPUs that a replica reserves")
    threads_per_replica: Annotated[int, RAY] = Field(
        1, ge=1, description="CPU threads that a model computes with"
    )
    address: Annotated[str | None, RAY, Metavar("HOST:PORT")] = Field(
        None, description="Ray cluster to run on; default: start one on this machine"
    )
    fake: Annotated[Fake, TESTING] = Field(default_factory=Fake)

    @field_validator("replicas", mode="before")
    @classmethod
    def _replicas(cls, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("give it in quotes: YAML reads 1:4 as the number 64")
        parts = value.split(":")
        if not (len(parts) <= 2 and all(p.isdigit() and int(p) > 0 for p in parts)):
            raise ValueError("expected a number such as 2, or MIN:MAX such as 1:8")
        if int(parts[0]) > int(parts[-1]):
            raise ValueError(f"the smaller number comes first: {parts[1]}:{parts[0]}")
        return value
