"""Configuration of `sharegpt4v check`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sharegpt4v.config.base import OUTPUT, RAY, Metavar
from sharegpt4v.config.images import ImagesConfig


class CheckConfig(ImagesConfig):
    """Look at every image of a manifest, without a model."""

    out: Annotated[Path | None, OUTPUT] = Field(
        None, description="folder for rejects/, duplicates/ and summary.json; default: nothing is written"
    )
    strict: Annotated[bool, OUTPUT] = Field(
        False, description="exit code 1 when any image is missing, broken or oversized, as when it is unread"
    )
    address: Annotated[str | None, RAY, Metavar("HOST:PORT")] = Field(
        None, description="Ray cluster to run on; default: start one on this machine"
    )
