"""Configuration of `sharegpt4v export`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sharegpt4v.config.base import CommandConfig

ExportFormat = Literal["llava-json", "messages", "hf", "webdataset"]


class ExportConfig(CommandConfig):
    """`sharegpt4v export`: hand a run on in a format other tools read."""

    run: Path = Field(description="run folder")
    format: ExportFormat = Field(
        description="LLaVA's JSON, messages for ms-swift and LLaMA-Factory, Hugging Face data set, tar shards"
    )
    out: Path | None = Field(None, description="file or folder to write; default: beside the run")
    root: str | None = Field(None, description="where the images are now; default: where the run read them")
    with_images: bool = Field(False, description="hf with the images themselves; webdataset always has them")
    partial: bool = Field(False, description="take the captions that an unfinished run has so far")
