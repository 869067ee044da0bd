"""Configuration of `sharegpt4v compare`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sharegpt4v.config.base import INPUT, OUTPUT, CommandConfig


class CompareConfig(CommandConfig):
    """Put two finished captioning runs, or two training runs, side by side on one page."""

    a: Annotated[Path, INPUT] = Field(
        description="finished run folder, shown left; images are read where this run read them"
    )
    b: Annotated[Path, INPUT] = Field(description="finished run folder, shown right")
    out: Annotated[Path | None, OUTPUT] = Field(
        None, description="page to write, *.html; default: A-vs-B.html beside the first"
    )
