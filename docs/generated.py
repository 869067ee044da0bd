"""Writes parts of pages from the code itself, where a page says `<!-- generated: NAME -->`.

An extension of Sphinx (conf.py names it). Nothing that is written here is kept anywhere.
"""

import importlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx

from cluster.cli import COMMANDS
from cluster.command_line import commands_of
from cluster.parameters import flags, with_flags
from sharegpt4v import inspection, records
from sharegpt4v.config.base import GROUPS, CommandConfig, flat_fields, flat_values

_MARK = re.compile(r"<!-- generated: (\w+) -->")
_KINDS = {
    str: "text",
    Path: "path",
    int: "integer",
    float: "number",
    bool: "true or false",
    dict: "mapping",
    tuple: "list of texts",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def commands() -> str:
    """Every command: its fields by group, and its presets."""
    modules = {name: importlib.import_module(module) for name, module in COMMANDS.items()}
    found = [command for module in modules.values() for command in commands_of(module.COMMAND)]
    return "\n".join(_command(command.name, command.config_class) for command in found)


def columns(name: str, schema: pa.Schema, texts: Mapping[str, str]) -> str:
    """A table of a schema's columns; a KeyError for one without a description."""
    rows = [f"| `{column.name}` | `{column.type}` | {texts[column.name]} |" for column in schema]
    return "\n".join([f"| column of {name} | type | holds |", "|---|---|---|", *rows, ""])


PARTS: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "manifest": lambda: columns("manifest/", records.MANIFEST, records.COLUMNS),
    "captions": lambda: columns("captions/", records.CAPTIONS, records.COLUMNS),
    "rejects": lambda: columns("rejects/", records.REJECTS, records.COLUMNS),
    "duplicates": lambda: columns("duplicates/", inspection.DUPLICATES, inspection.COLUMNS),
}


def _command(name: str, config_class: type[CommandConfig]) -> str:
    lines = [f"## {name}", "", f"{config_class.__doc__}", ""]
    fields = list(flat_fields(config_class))
    titles = [group.title for group in GROUPS] + ["Other"]
    for title in titles:
        members = [(dotted, field) for dotted, field, group in fields if group == title]
        if members:
            lines += [f"### {title} of {name}", ""]
        for dotted, field in members:
            lines += _field(dotted, field, config_class)
    return "\n".join([*lines, *_presets(name, config_class)])


def _field(dotted: str, field: FieldInfo, config_class: type[CommandConfig]) -> Iterator[str]:
    """An entry of a definition list: the field, then its type, default and description."""
    yield f"`{dotted}`"
    facts = f"{_kind(field.annotation)}{_bounds(field)}; {_default(field)}"
    description = _with_flags(field.description or "", config_class)
    yield f": *{facts}*\\\n  {description}"
    yield ""


def _with_flags(text: str, config_class: type[CommandConfig]) -> str:
    return with_flags(text, {name: f"`{flag}`" for name, flag in flags(config_class).items()})


def _kind(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(part) for part in parts if part is not type(None))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    return _KINDS[origin or annotation]


def _bounds(field: FieldInfo) -> str:
    found = [
        f"{word} {getattr(mark, sign):g}"
        for mark in field.metadata
        for sign, word in _BOUNDS.items()
        if isinstance(getattr(mark, sign, None), int | float)
    ]
    return f", {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "optional" if value is None or value == () else f"default `{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _presets(name: str, config_class: type[CommandConfig]) -> Iterator[str]:
    if not config_class.presets:
        return
    yield from (f"### Presets of {name}", "")
    for number, (preset, layer) in enumerate(config_class.presets.items()):
        first = " (the default)" if number == 0 else ""
        yield from (f"`{preset}`{first}", f": {_with_flags(layer.text, config_class)}", "")
        for dotted, value in flat_values(layer.values).items():
            yield f"  - `{dotted}`: " + (f"`{_plain(value)}`" if value != "" else "to be given")
        yield ""


def _insert(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = _MARK.sub(lambda mark: PARTS[mark[1]](), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True}
