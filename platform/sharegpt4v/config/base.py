"""Configurations, one frozen model per stage, and the presets that fill them.

Importable without torch or Ray. Flags of the command line ARE these fields (dotted for nested ones); an
unknown key is an error that names the nearest valid one.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sharegpt4v.errors import UserError


class CommandConfig(BaseModel):
    """Frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=CommandConfig)


def resolve(stage: type[S], *layers: Mapping[str, Any]) -> S:
    """The configuration from layers of increasing weight: preset, file, flags. Nested keys merge.

    Raises UserError, one line, for an unknown key (with the nearest valid one) or a value out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    _refuse_unknown(stage, merged, "")
    try:
        return stage.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{key} is missing: give --{key.replace('_', '-')}") from None
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{key} = {first['input']!r} is refused: {reason}") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """A configuration file. Raises UserError when it is missing, not YAML, or not a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected keys and values")
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _refuse_unknown(stage: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        if key not in stage.model_fields:
            near = difflib.get_close_matches(str(key), stage.model_fields, n=1, cutoff=0.5)
            hint = (
                f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(stage.model_fields)}"
            )
            raise UserError(f"unknown key {prefix}{key}{hint}")
        nested = stage.model_fields[key].annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel) and isinstance(value, Mapping):
            _refuse_unknown(nested, value, f"{prefix}{key}.")
