"""Configuration of `sharegpt4v convert`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sharegpt4v.config.base import INPUT, OUTPUT, CommandConfig


class ConvertConfig(CommandConfig):
    """Turn a released checkpoint into one that others load, and LLaVA's back again."""

    checkpoint: Annotated[Path, INPUT] = Field(
        description="released ShareGPT4V, LLaVA-1.5 or Share-Captioner, or a transformers LLaVA folder"
    )
    out: Annotated[Path, OUTPUT] = Field(description="folder to write; it must be new or empty")
    to: Annotated[Literal["transformers", "released"], OUTPUT] = Field(
        "transformers", description="layout to write; released is for LLaVA alone"
    )
    vision_tower: Annotated[Path | None, INPUT] = Field(
        None, description="CLIPVisionModel folder of a released checkpoint that comes without its tower"
    )
    tokenizer: Annotated[Path | None, INPUT] = Field(
        None, description="folder with tokenizer.json or tokenizer.model; default: the checkpoint's"
    )
    shard_gb: Annotated[float, OUTPUT] = Field(
        5.0, gt=0, allow_inf_nan=False, description="size of an output file at most, in 10^9 bytes"
    )
