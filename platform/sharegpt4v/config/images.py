"""Configuration fields that every command over images has."""

from typing import Annotated

from pydantic import Field

from sharegpt4v.config.base import INPUT, CommandConfig, Metavar


class ImagesConfig(CommandConfig):
    """Which images a command is about."""

    images: Annotated[str, INPUT, Metavar("PATH")] = Field(
        description="folder of images, or a manifest: JSON array, JSONL, Parquet, tar shards; local or URI"
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
