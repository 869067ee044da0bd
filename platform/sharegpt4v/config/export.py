"""Configuration of `sharegpt4v export`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sharegpt4v.config.base import CommandConfig


class ExportConfig(CommandConfig):
    """`sharegpt4v export`: hand a finished run on in a format other tools read."""

    run: Path = Field(description="finished run folder")
    format: Literal["llava-json", "hf", "webdataset"] = Field(description="what to write")
    out: Path | None = Field(None, description="file or folder to write; default: beside the run")
    root: str | None = Field(None, description="where the images are now; default: where the run read them")
