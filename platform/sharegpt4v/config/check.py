"""Configuration of `sharegpt4v check`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sharegpt4v.config.base import INPUT, OUTPUT, RAY, CommandConfig, Metavar


class CheckConfig(CommandConfig):
    """Look at every image of a manifest, without a model."""

    images: Annotated[str, INPUT, Metavar("PATH")] = Field(
        description="folder of images, or a manifest: JSON array, JSONL, Parquet, tar shards; local or URI"
    )
    out: Annotated[Path | None, OUTPUT] = Field(
        None, description="folder for rejects/, duplicates/ and summary.json; default: nothing is written"
    )
    root: Annotated[str | None, INPUT, Metavar("PATH")] = Field(
        None, description="where the manifest's image paths start; default: its folder"
    )
    limit: Annotated[int | None, INPUT] = Field(None, ge=1, description="only the first N images")
    sample: Annotated[int | None, INPUT] = Field(
        None, ge=1, description="so many images spread evenly over all sources, for a first look"
    )
    source: Annotated[str | None, INPUT] = Field(
        None, min_length=1, description="source of images that name none; default: their first folder"
    )
    dedupe_image: Annotated[bool, INPUT] = Field(
        False, description="take each image of a conversation file once"
    )
    strict: Annotated[bool, OUTPUT] = Field(
        False, description="exit code 1 when any image is missing, broken or oversized"
    )
    address: Annotated[str | None, RAY, Metavar("HOST:PORT")] = Field(
        None, description="Ray cluster to run on; default: start one on this machine"
    )
