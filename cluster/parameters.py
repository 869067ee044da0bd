"""The parameters of a command for cyclopts, made of its configuration's fields: names, types and help.

cyclopts is given a signature and not the configuration itself, because only what the user gave may count as a
layer above preset and file.
"""

import inspect
import json
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group as Section
from cyclopts import Parameter, Token
from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, HelpEntry, NameRenderer
from pydantic.fields import FieldInfo
from rich.console import Console, ConsoleOptions

from sharegpt4v.config.base import GROUPS, Bare, CommandConfig, Metavar, flat_fields, flat_values

M = TypeVar("M", Metavar, Bare)

_NO_BREAK = "\u00a0"
_PRESET_WIDTH = 74
"""Characters of a line of a preset's values, which are indented by 2 in a box on a terminal of 80 columns."""


def signature(config_class: type[CommandConfig]) -> inspect.Signature:
    """Makes a keyword parameter of each field, under its heading, and those that every command has.

    Arguments come as texts (booleans and choices as what they are), without what was not given; a field
    marked Bare that was given without a value comes as an empty text.
    """
    return inspect.Signature(list(_parameters(config_class)))


def usage(name: str, config_class: type[CommandConfig]) -> str:
    """Returns the first line of a command's help, with the flags that must be given."""
    fields = [(dotted, field) for dotted, field, _ in flat_fields(config_class) if field.is_required()]
    required = "".join(f"{_flag(dotted)} {_word(field)} " for dotted, field in fields)
    return f"Usage: sharegpt4v {name} {required}[flags]"


def field_name(parameter: str) -> str:
    """Returns the dotted field that a parameter of `signature` is for."""
    return parameter.replace("__", ".")


def bare_values(config_class: type[CommandConfig]) -> dict[str, str]:
    """Returns the values of fields whose flag is given without one, by dotted name."""
    return {name: mark.value for name, field, _ in flat_fields(config_class) if (mark := _mark(field, Bare))}


def flags(config_class: type[CommandConfig]) -> dict[str, str]:
    """Flags by the names that errors may call their fields by.

    A function of the library knows its argument's name and not where a configuration nests it, so the last
    part of a dotted name will do if only one field has it.
    """
    names = [dotted for dotted, _, _ in flat_fields(config_class)] + ["config", "preset"]
    leaves = [name.rpartition(".")[2] for name in names]
    found = {leaf: _flag(name) for leaf, name in zip(leaves, names, strict=True) if leaves.count(leaf) == 1}
    return found | {name: _flag(name) for name in names}


def with_flags(text: str, known: Mapping[str, str]) -> str:
    """Replaces the fields that a text names in backticks by flags. known: see `flags`."""
    return re.sub(r"`([\w.]+)`", lambda found: known.get(found[1], found[0]), text)


def help_formatter() -> DefaultFormatter:
    """Prints flags in a column as wide as the longest, which cyclopts would break in two at 80 columns."""
    return DefaultFormatter(column_specs=_columns)


def _columns(console: Console, options: ConsoleOptions, entries: list[HelpEntry]) -> tuple[ColumnSpec, ...]:
    longest = max(len(name) for entry in entries for name in entry.display_labels)
    names = NameRenderer(max_width=max(longest + len(" N"), console.width * 35 // 100))
    return (
        ColumnSpec(renderer=names, style="cyclopts.name", no_wrap=True),
        ColumnSpec(renderer=DescriptionRenderer(), overflow="fold"),
    )


def _parameters(config_class: type[CommandConfig]) -> Iterator[inspect.Parameter]:
    titles = ["Required", *(group.title for group in GROUPS), "Other", "Presets", "Every command"]
    text = {"Presets": _presets_text(config_class)}
    sections = {t: Section(t, sort_key=place, help=text.get(t, "")) for place, t in enumerate(titles)}
    known = flags(config_class)
    for dotted, field, title in flat_fields(config_class):
        yield _parameter(dotted, field, sections["Required" if field.is_required() else title], known)
    if config_class.presets:
        first = next(iter(config_class.presets))
        names: Any = Literal[tuple(config_class.presets)]
        help_text = f"the values above, which --config and the flags override [default: {first}]"
        yield _keyword("preset", names, help=help_text, group=sections["Presets"])
    group = sections["Every command"]
    help_text = "YAML file with these fields, which the flags override"
    yield _keyword("config", Path, help=help_text, group=group, metavar="PATH")
    help_text = "print the resolved configuration and the plan"
    yield _keyword("dry_run", bool, help=help_text, group=group, negative=())
    yield _keyword("debug", bool, help="show tracebacks", group=group, negative=())


def _parameter(
    dotted: str, field: FieldInfo, section: Section, known: Mapping[str, str]
) -> inspect.Parameter:
    kind, word = _plain_type(field.annotation), _word(field)
    text = with_flags(field.description or "", known)
    options: dict[str, Any] = {"help": text + _default_text(field), "group": section}
    if kind is bool or typing.get_origin(kind) is Literal:
        return _keyword(dotted, kind, **options)
    if typing.get_origin(kind) is tuple:
        return _keyword(dotted, list[str], metavar=word, negative=(), **options)
    if typing.get_origin(kind) is dict:
        return _keyword(dotted, Any, metavar="JSON", converter=_json, **options)
    if _mark(field, Bare):
        return _keyword(dotted, str, n_tokens=-1, consume_multiple=(0, 1), metavar=f"[{word}]", **options)
    # Path makes shells complete file names. The text stays as it is: a Path would lose a slash of s3://.
    given = Path if word == "PATH" else str
    return _keyword(dotted, given, metavar=word, converter=_text, **options)


def _keyword(dotted: str, kind: Any, **options: Any) -> inspect.Parameter:
    mark = Parameter(name=_flag(dotted), show_default=False, allow_repeating=True, **options)
    annotation = Annotated[kind | None, mark]
    return inspect.Parameter(
        dotted.replace(".", "__"), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _flag(dotted: str) -> str:
    return f"--{dotted.replace('_', '-')}"


def _word(field: FieldInfo) -> str:
    """Returns the word that help shows for a value."""
    if mark := _mark(field, Metavar):
        return mark.word
    kind = _plain_type(field.annotation)
    if typing.get_origin(kind) is Literal:
        return "CHOICE"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _mark(field: FieldInfo, kind: type[M]) -> M | None:
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)


def _plain_type(annotation: Any) -> Any:
    """Returns the one type beside None of an optional field."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def _default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    hidden = field.is_required() or value is None or value is False or value in ("", {}, ())
    return "" if hidden else f" [default: {_plain(value)}]"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _presets_text(config_class: type[CommandConfig]) -> str:
    lines: list[str] = []
    known = flags(config_class)
    for name, preset in config_class.presets.items():
        values = {dotted: value for dotted, value in flat_values(preset.values).items() if value != ""}
        given = [f"{_flag(dotted)} {shlex.quote(_plain(value))}" for dotted, value in values.items()]
        # A flag and its value stay on one line.
        joined = " ".join(pair.replace(" ", _NO_BREAK) for pair in given)
        wrapped = textwrap.wrap(joined, _PRESET_WIDTH, break_long_words=False, break_on_hyphens=False)
        lines += [f"{name}: {with_flags(preset.text, known)}"]
        lines += [f"  {line.replace(_NO_BREAK, ' ')}" for line in wrapped]
    return "\n".join(lines)


def _text(_: Any, tokens: Sequence[Token]) -> str:
    return tokens[0].value


def _json(_: Any, tokens: Sequence[Token]) -> Any:
    try:
        return json.loads(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not JSON") from None
