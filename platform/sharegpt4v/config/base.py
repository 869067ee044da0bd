"""What every configuration has: frozen models, marks of their fields, presets, and layers that become one.

Importable without torch or Ray. Flags of the command line ARE these fields (dotted for nested ones); an
unknown key is an error that names the nearest valid one.
"""

import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sharegpt4v.errors import UserError


@dataclass(frozen=True, slots=True)
class Group:
    """Marks a field with the heading that help and documentation list it under; nested fields inherit it."""

    title: str


INPUT, MODEL, DECODING, GATE = Group("Input"), Group("Model"), Group("Decoding"), Group("Gate")
DATA, OPTIMIZER = Group("Data"), Group("Optimizer")
OUTPUT, RAY, TESTING = Group("Output"), Group("Ray"), Group("Testing")
SERVER, LIMITS = Group("Server"), Group("Limits")
GROUPS = (INPUT, DATA, MODEL, OPTIMIZER, DECODING, GATE, OUTPUT, SERVER, LIMITS, RAY, TESTING)
"""In the order of their headings."""


@dataclass(frozen=True, slots=True)
class Metavar:
    """Marks a field with the word for its value in help; PATH is a file, a folder or a URI."""

    word: str


@dataclass(frozen=True, slots=True)
class Bare:
    """Marks a field that may be named without a value, with the value it then has."""

    value: str


@dataclass(frozen=True, slots=True)
class Preset:
    """Values under a name, a layer below file and flags. text: what it is for, in one line."""

    text: str
    values: Mapping[str, Any]


class CommandConfig(BaseModel):
    """Frozen, and strict about its keys. presets: the first one is the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    presets: ClassVar[Mapping[str, Preset]] = {}


C = TypeVar("C", bound=CommandConfig)


def flat_fields(
    config_class: type[CommandConfig], prefix: str = "", group: str = "Other"
) -> Iterator[tuple[str, FieldInfo, str]]:
    """Yields every field that is no configuration itself: its dotted name, the field, its group's title."""
    for key, field in config_class.model_fields.items():
        title = next((mark.title for mark in field.metadata if isinstance(mark, Group)), group)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, CommandConfig):
            yield from flat_fields(kind, f"{prefix}{key}.", title)
        else:
            yield prefix + key, field, title


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a layer's values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= flat_values(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def resolve(config_class: type[C], *layers: Mapping[str, Any]) -> C:
    """Makes the configuration of layers of increasing weight: preset, file, flags. Nested keys merge.

    Raises UserError, one line, for an unknown key (with the nearest valid one) or a value out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    _refuse_unknown(config_class, merged, "")
    try:
        return config_class.model_validate(merged)
    except ValidationError as error:
        found = error.errors()
    missing = [_dotted(item["loc"]) for item in found if item["type"] == "missing"]
    if missing:
        also = "".join(f", and so is `{key}`" for key in missing[1:])
        raise UserError(f"required{also}", field=missing[0])
    first = found[0]
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
    raise UserError(f"{first['input']!r} is refused: {reason}", field=_dotted(first["loc"]))


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _refuse_unknown(config_class: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        if key not in config_class.model_fields:
            near = difflib.get_close_matches(str(key), config_class.model_fields, n=1, cutoff=0.5)
            hint = (
                f"; did you mean {prefix}{near[0]}?"
                if near
                else f"; known: {', '.join(config_class.model_fields)}"
            )
            raise UserError(f"unknown key {prefix}{key}{hint}")
        nested = config_class.model_fields[key].annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{value!r} is refused: it should be keys and values", field=prefix + str(key)
                )
            _refuse_unknown(nested, value, f"{prefix}{key}.")
        elif isinstance(value, bool) and not {nested, *typing.get_args(nested)} & {bool, Any}:
            # pydantic would take true for the number 1: `limit: true` is one image.
            given = str(value).lower()
            raise UserError(f"{given} is refused: the field is no switch", field=prefix + str(key))
