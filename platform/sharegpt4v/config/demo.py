"""Configuration of `sharegpt4v demo`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from sharegpt4v.config.base import INPUT, OUTPUT, SERVER, CommandConfig, Metavar

SERVED_HERE = "http://127.0.0.1:8000"
"""Where `sharegpt4v serve` answers by default."""


class DemoConfig(CommandConfig):
    """Open a page in the browser to chat about images and to caption them, over a running API."""

    api: Annotated[str | None, INPUT, Metavar("URL")] = Field(
        None, description=f"where `sharegpt4v serve` answers; default: {SERVED_HERE}"
    )
    toys: Annotated[bool, INPUT] = Field(
        False, description="serve both toy models for as long as the page is open, instead of `api`"
    )
    api_key_file: Annotated[Path | None, INPUT] = Field(None, description="file that holds the API's key")
    feedback: Annotated[Path, OUTPUT] = Field(
        Path("feedback.jsonl"), description="file that thumbs are appended to, with question and answer"
    )
    host: Annotated[str, SERVER] = Field(
        "127.0.0.1", description="address to listen on; another than this machine's own wants `login`"
    )
    port: Annotated[int, SERVER] = Field(7860, ge=1, le=65535, description="port to listen on")
    login: Annotated[Path | None, SERVER] = Field(
        None,
        description="file of NAME sha256:HEX lines, as of `python -m serve.keys NAME`: users and passwords",
    )
    upload_megabytes: Annotated[int, SERVER] = Field(
        10, ge=1, description="largest file that may be uploaded"
    )

    @field_validator("api")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL such as http://127.0.0.1:8000")
        return value.rstrip("/").removesuffix("/v1")
