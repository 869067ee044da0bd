"""Configuration of `sharegpt4v check`."""

from pathlib import Path

from pydantic import Field

from sharegpt4v.config.base import CommandConfig


class CheckConfig(CommandConfig):
    """`sharegpt4v check`: look at every image of a manifest without a model."""

    images: str = Field(description="folder of images or manifest, as for caption")
    out: Path | None = Field(
        None, description="folder for rejects/, duplicates/ and summary.json; default: nothing is written"
    )
    root: str | None = Field(None, description="where the manifest's image paths start; default: its folder")
    limit: int | None = Field(None, ge=1, description="only the first N images")
    sample: int | None = Field(
        None, ge=1, description="so many images spread evenly over all sources, for a first look"
    )
    source: str | None = Field(
        None, min_length=1, description="source of images that name none; default: their first folder"
    )
    dedupe_image: bool = Field(False, description="take each image of a conversation file once")
    strict: bool = Field(False, description="exit code 1 when any image is missing, broken or oversized")
    address: str | None = Field(None, description="Ray cluster to run on; default: start one on this machine")
