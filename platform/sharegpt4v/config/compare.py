"""Configuration of `sharegpt4v compare`."""

from pathlib import Path

from pydantic import Field

from sharegpt4v.config.base import CommandConfig


class CompareConfig(CommandConfig):
    """`sharegpt4v compare`: two finished captioning runs side by side, as one HTML page."""

    a: Path = Field(description="finished run folder, shown left; images are read where this run read them")
    b: Path = Field(description="finished run folder, shown right")
    out: Path | None = Field(None, description="page to write, *.html; default: A-vs-B.html beside the first")
