"""Configuration of `sharegpt4v train`: one class a stage, whose presets are the recipes with their sources.

Sources: [paper] arXiv 2311.12793; [release] the released scripts; [ours] chosen here, because nobody has
published it or because a toy model needs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from sharegpt4v.config.base import (
    DATA,
    MODEL,
    OPTIMIZER,
    OUTPUT,
    RAY,
    CommandConfig,
    Metavar,
    Preset,
)
from sharegpt4v.dialogue import ImageProtocol

StageName = Literal["captioner", "align", "pretrain", "sft"]
TemplateName = Literal["captioner", "plain", "vicuna_v1"]


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage is, whatever the size of its model.

    trains: for people; models/freeze.py selects the tensors. family: `model_type` of its models.
    template: of TEMPLATES. one_question: every question is replaced by the captioner's own prompt, as the
    question of a caption file is not the one that was asked.
    """

    name: StageName
    trains: str
    family: Literal["share_captioner", "llava"]
    template: TemplateName
    one_question: bool = False


STAGES: Mapping[StageName, Stage] = {
    stage.name: stage
    for stage in (
        Stage("captioner", "vision tower, sampler, language model", "share_captioner", "captioner", True),
        Stage("align", "projector", "llava", "plain"),
        Stage("pretrain", "projector, language model, late vision blocks", "llava", "plain"),
        Stage("sft", "projector, language model", "llava", "vicuna_v1"),
    )
}

_RELEASED = {  # [release] of the three stages of ShareGPT4V
    "epochs": 1.0,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "clip": 0.0,  # none in the released runs
    "max_length": 2048,
    "seed": 42,
}
_ON_GPUS = {  # [release] bf16 and checkpointing; [ours] ZeRO stage and token budget
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "gpus_per_worker": 1.0,
    "cpus_per_worker": 8.0,
    "decode_threads": 6,
    "zero": 2,
    "tokens_per_micro_step": 16_384,
    "save_minutes": 30.0,
    "save_steps": 0,
    "init": None,
}
_TOY = {  # [ours]
    "epochs": 1.0,
    "beta2": 0.95,
    "weight_decay": 0.05,
    "warmup_ratio": 0.03,
    "clip": 1.0,
    "max_length": 1024,
    "protocol": "squash",
    "seed": 0,
}


class TrainConfig(CommandConfig):
    """Fields of all stages. Subclasses name their stage and its presets."""

    stage: ClassVar[Stage]

    data: Annotated[tuple[str, ...], DATA, Metavar("PATH[:WEIGHT]")] = Field(
        min_length=1,
        description="caption run, or conversations as JSON, JSONL or Parquet; may be repeated; a weight of "
        "0.5 takes half of its samples an epoch, 2 takes each twice",
    )
    out: Annotated[Path, OUTPUT] = Field(
        description="run folder that every node sees; the same command again resumes"
    )
    root: Annotated[str | None, DATA, Metavar("PATH")] = Field(
        None, description="where image paths start; default: each run's own root, each file's folder"
    )
    eval_data: Annotated[tuple[str, ...], DATA, Metavar("PATH")] = Field(
        (), description="held-out data, whose loss is computed at every checkpoint; may be repeated"
    )
    protocol: Annotated[ImageProtocol, DATA] = Field("pad", description="how images become square")
    max_length: Annotated[int, DATA] = Field(
        2048, ge=8, description="tokens of the longest sample; longer ones are cut at a turn's end"
    )
    too_long: Annotated[Literal["cut", "refuse"], DATA] = Field(
        "cut", description="what happens to longer samples: cut at a turn's end, or the run stops"
    )
    max_reject_rate: Annotated[float, DATA] = Field(
        0.05, ge=0, le=1, description="share of unusable samples above which the run stops"
    )
    decode_threads: Annotated[int, DATA] = Field(
        2, ge=1, description="threads of each worker that read, decode and tokenise ahead"
    )
    init: Annotated[str | None, MODEL, Metavar("PATH")] = Field(
        None, description="transformers folder of the model to start from; toy: the shipped one"
    )
    first_block: Annotated[int, MODEL] = Field(
        12, ge=0, description="first vision block that pre-training trains (paper, Table 8: 12)"
    )
    lora_rank: Annotated[int, MODEL] = Field(
        0, ge=0, description="train adapters (LoRA) of this rank in place of the language model; 0: itself"
    )
    lora_alpha: Annotated[float | None, MODEL] = Field(
        None, gt=0, description="adapters are scaled by alpha / rank; default: twice the rank"
    )
    dtype: Annotated[Literal["float32", "bfloat16"], MODEL] = Field(
        "float32", description="of weights and activations; the optimizer keeps float32 with ZeRO"
    )
    gradient_checkpointing: Annotated[bool, MODEL] = Field(
        False, description="compute activations again in the backward pass, to save memory"
    )
    epochs: Annotated[float, OPTIMIZER] = Field(1.0, gt=0, description="passes over the data")
    max_steps: Annotated[int | None, OPTIMIZER] = Field(
        None, ge=1, description="length of the whole schedule in steps, in place of `epochs`"
    )
    stop_after: Annotated[int | None, OPTIMIZER] = Field(
        None, ge=1, description="end after so many steps of an unchanged schedule; a resume goes on"
    )
    batch_size: Annotated[int, OPTIMIZER] = Field(
        128, ge=1, description="samples of one optimizer step, over all workers"
    )
    tokens_per_micro_step: Annotated[int, OPTIMIZER] = Field(
        8192, ge=8, description="tokens of one packed row; a step is as many rows as its samples need"
    )
    packing: Annotated[Literal["on", "off"], OPTIMIZER] = Field(
        "on",
        description="off: rows of one modality and of like length, padded to the longest sample, as the "
        "released code has them; slower, with the same loss",
    )
    optimizer: Annotated[Literal["adamw", "muon"], OPTIMIZER] = Field(
        "adamw", description="muon: for the matrices of layers, AdamW for the rest; without ZeRO only"
    )
    learning_rate: Annotated[float, OPTIMIZER] = Field(2e-5, gt=0, description="peak")
    matrix_learning_rate: Annotated[float | None, OPTIMIZER] = Field(
        None, gt=0, description="peak of what Muon trains; default: `learning_rate`"
    )
    projector_learning_rate: Annotated[float | None, OPTIMIZER] = Field(
        None, gt=0, description="peak of projector or sampler; default: `learning_rate`"
    )
    vision_learning_rate: Annotated[float | None, OPTIMIZER] = Field(
        None, gt=0, description="peak of the vision tower; default: `learning_rate`"
    )
    beta2: Annotated[float, OPTIMIZER] = Field(0.999, ge=0, lt=1, description="AdamW's second beta")
    weight_decay: Annotated[float, OPTIMIZER] = Field(0.0, ge=0, description="AdamW's and Muon's")
    warmup_ratio: Annotated[float, OPTIMIZER] = Field(
        0.03, ge=0, lt=1, description="share of the steps with a rising rate; then a cosine to zero"
    )
    clip: Annotated[float, OPTIMIZER] = Field(0.0, ge=0, description="largest gradient norm; 0: no limit")
    skip_spikes: Annotated[float, OPTIMIZER] = Field(
        0.0,
        ge=0,
        description="skip and record steps whose gradient norm is so many times the recent median, or not "
        "a number; 0: never skip, stop at the latter",
    )
    seed: Annotated[int, OPTIMIZER] = Field(42, ge=0, description="of the order of the samples")
    save_steps: Annotated[int, OUTPUT] = Field(100, ge=0, description="a checkpoint every N steps; 0: none")
    save_minutes: Annotated[float, OUTPUT] = Field(
        0.0, ge=0, description="and one every N minutes; 0: none by time"
    )
    keep: Annotated[int, OUTPUT] = Field(2, ge=1, description="newest checkpoints that are kept")
    workers: Annotated[str, RAY, Metavar("N")] = Field(
        "auto", description="training workers; auto: one a GPU of the cluster, otherwise 1"
    )
    zero: Annotated[Literal[0, 2, 3], RAY] = Field(
        0, description="DeepSpeed's ZeRO stage; 0: plain torch, every worker has everything"
    )
    offload: Annotated[bool, RAY] = Field(False, description="keep optimizer states in main memory")
    gpus_per_worker: Annotated[float, RAY] = Field(0.0, ge=0, description="0 trains on CPU")
    cpus_per_worker: Annotated[float, RAY] = Field(1.0, gt=0, description="CPUs each worker reserves")
    max_failures: Annotated[int, RAY] = Field(
        10, ge=0, description="deaths of workers after which the job goes on from its last checkpoint"
    )
    hang_seconds: Annotated[float, RAY] = Field(
        1800.0, gt=0, description="a worker that does not reach the next step for so long ends the job"
    )
    address: Annotated[str | None, RAY, Metavar("HOST:PORT")] = Field(
        None, description="Ray cluster to run on; default: start one on this machine"
    )

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: str) -> str:
        if value != "auto" and not (value.isdigit() and int(value) > 0):
            raise ValueError("expected auto, or a number such as 2")
        return value


class CaptionerConfig(TrainConfig):
    """Train the captioner on detailed captions: vision tower, sampler and language model."""

    stage = STAGES["captioner"]
    presets: ClassVar[Mapping[str, Preset]] = {
        "toy": Preset(
            "the toy captioner, on CPU",
            _TOY
            | {
                "batch_size": 32,
                "optimizer": "muon",
                "learning_rate": 3e-3,
                "matrix_learning_rate": 4e-3,
                "init": "toy",
            },
        ),
        "7b": Preset(
            "Share-Captioner on GPUs; `init` must name a converted InternLM-XComposer",
            _ON_GPUS
            | {
                # [paper] rate, batch and epochs; the rest is the nearest public recipe of the family.
                "learning_rate": 2e-5,
                "batch_size": 1024,
                "epochs": 2.0,
                "weight_decay": 0.1,
                "beta2": 0.95,
                "warmup_ratio": 0.01,
                "clip": 1.0,
                "max_length": 2048,
                "protocol": "squash",
                "seed": 42,
            },
        ),
    }


class LmmConfig(TrainConfig):
    """Stages of ShareGPT4V may start from its parts."""

    language_model: Annotated[Path | None, MODEL] = Field(
        None, description="transformers folder of a Vicuna to start from, in place of `init`"
    )
    vision_tower: Annotated[Path | None, MODEL] = Field(
        None, description="transformers folder of a CLIP tower, with `language_model`"
    )
    projector: Annotated[Path | None, MODEL] = Field(
        None, description="safetensors file of a projector, with `language_model`; default: untrained"
    )


def _sizes(toy: dict[str, Any], real: dict[str, Any]) -> Mapping[str, Preset]:
    large = _RELEASED | _ON_GPUS | real
    return {
        "toy": Preset("the toy model, on CPU", _TOY | {"init": "toy", "first_block": 2} | toy),
        "7b": Preset("ShareGPT4V-7B on GPUs; what it starts from must be named", large),
        "13b": Preset(
            "ShareGPT4V-13B on GPUs: the rates of 7b, parameters divided among the workers",
            large | {"zero": 3, "tokens_per_micro_step": 8192},
        ),
    }


class AlignConfig(LmmConfig):
    """Train the projector on short captions, between a vision tower and a language model that stay."""

    stage = STAGES["align"]
    presets: ClassVar[Mapping[str, Preset]] = _sizes(
        {"batch_size": 32, "learning_rate": 3e-3},
        {"learning_rate": 1e-3, "batch_size": 256, "protocol": "crop"},  # [release]
    )


class PretrainConfig(LmmConfig):
    """Train projector, language model and late vision blocks on detailed captions."""

    stage = STAGES["pretrain"]
    presets: ClassVar[Mapping[str, Preset]] = _sizes(
        {"batch_size": 32, "optimizer": "muon", "learning_rate": 3e-3, "matrix_learning_rate": 4e-3},
        {
            "learning_rate": 2e-5,
            "batch_size": 256,
            "first_block": 12,
            "protocol": "crop",
        },  # [paper] [release]
    )


class SftConfig(LmmConfig):
    """Train projector and language model on conversations; the vision tower stays."""

    stage = STAGES["sft"]
    presets: ClassVar[Mapping[str, Preset]] = _sizes(
        {"batch_size": 32, "optimizer": "muon", "learning_rate": 2e-3, "matrix_learning_rate": 3e-3},
        {"learning_rate": 2e-5, "batch_size": 128, "protocol": "pad"},  # [paper] [release]
    )


CONFIGS: Mapping[StageName, type[TrainConfig]] = {
    "captioner": CaptionerConfig,
    "align": AlignConfig,
    "pretrain": PretrainConfig,
    "sft": SftConfig,
}
"""The configuration of each stage, in the order of the chain."""
