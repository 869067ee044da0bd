"""Configuration of `sharegpt4v export`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sharegpt4v.config.base import INPUT, OUTPUT, CommandConfig, Metavar

ExportFormat = Literal["llava-json", "messages", "hf", "webdataset"]


class ExportConfig(CommandConfig):
    """Write a run in a format that other tools read."""

    run: Annotated[Path, INPUT] = Field(description="run folder")
    format: Annotated[ExportFormat, OUTPUT] = Field(
        description="LLaVA's JSON, messages for ms-swift and LLaMA-Factory, Hugging Face data set, tar shards"
    )
    out: Annotated[Path | None, OUTPUT] = Field(
        None, description="file or folder to write; default: beside the run"
    )
    root: Annotated[str | None, INPUT, Metavar("PATH")] = Field(
        None, description="where the images are now; default: where the run read them"
    )
    with_images: Annotated[bool, OUTPUT] = Field(
        False, description="hf with the images themselves; webdataset always has them"
    )
    partial: Annotated[bool, INPUT] = Field(
        False, description="take the captions that an unfinished run has so far"
    )
