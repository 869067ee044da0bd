"""Command-line flags that ARE configuration fields, and the one way commands end.

sharegpt4v caption --images photos --out run --decoding.max-new-tokens 200
"""

import argparse
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic.fields import FieldInfo

from sharegpt4v.config.base import CommandConfig, load_yaml, resolve
from sharegpt4v.errors import RunFailed, UserError

S = TypeVar("S", bound=CommandConfig)

EXIT_PROBLEM = 1  # the work was done or begun, and something is wrong
EXIT_USAGE = 2  # the user can put it right before anything runs
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it


def run_command(
    name: str,
    stage: type[S],
    action: Callable[[S], int],
    argv: Sequence[str],
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    bare: Mapping[str, str] | None = None,
    plan: Callable[[S], str] | None = None,
) -> int:
    """Parses flags into a configuration, runs `action`, and returns the exit code.

    presets: named layers below the file and the flags; the first one is the default. bare: fields whose
    flag may stand alone, and the value it then has. plan: what `--dry-run` says beside the resolved
    configuration. A UserError is one line on stderr and exit code 2, any other failure one line and 1;
    --debug shows the traceback of both.
    """
    parser = _parser(name, stage, presets or {}, bare or {})
    debug = "--debug" in argv
    try:
        values = _parse(parser, stage, argv)
        dry_run = values.pop("dry_run")
        config = _resolve(stage, values, presets or {})
        if dry_run:
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
            print(plan(config) if plan else "")
            return 0
        return action(config)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        return _fail(name, str(error), EXIT_USAGE, debug)
    except RunFailed as error:
        return _fail(name, str(error), EXIT_PROBLEM, debug)
    except Exception as error:  # the last resort of a command: one line says why, never a bare traceback
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return _fail(name, f"{cause} (--debug shows where)", EXIT_PROBLEM, debug)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line as for every other mistake: the usage of forty flags would bury it."""
        raise UserError(message.removeprefix("argument "))


def _parse(
    parser: argparse.ArgumentParser, stage: type[CommandConfig], argv: Sequence[str]
) -> dict[str, Any]:
    """Values by field. Raises UserError, for an unknown flag with the nearest valid one."""
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [_flag(dotted) for dotted, _ in _fields(stage, "")]
        near = get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    values = vars(known)
    del values["debug"]
    return values


def _fail(name: str, line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"sharegpt4v {name}: {line}", file=sys.stderr)
    return code


def _resolve(stage: type[S], values: dict[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> S:
    path = values.pop("config", None)
    from_file = load_yaml(Path(path)) if path else {}
    layers: list[Mapping[str, Any]] = []
    if presets:
        # The flag wins over the file's own `preset:` key, as every flag does.
        preset = values.pop("preset", None) or from_file.pop("preset", None) or next(iter(presets))
        if preset not in presets:
            raise UserError(f"unknown preset {preset!r}; known: {', '.join(presets)}")
        layers.append(presets[preset])
    return resolve(stage, *layers, from_file, _nested(values))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _parser(
    name: str, stage: type[CommandConfig], presets: Mapping[str, Mapping[str, Any]], bare: Mapping[str, str]
) -> argparse.ArgumentParser:
    # Left to itself argparse rewraps the text at a width that hides the fields' names.
    width = max(80, min(120, _terminal_columns()))
    parser = _Parser(
        prog=f"sharegpt4v {name}",
        description=stage.__doc__,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
    )
    for dotted, field in _fields(stage, ""):
        _add_flag(parser, dotted, field, bare.get(dotted))
    parser.add_argument("--config", metavar="FILE", help="YAML file with these fields; flags win over it")
    if presets:
        first = next(iter(presets))
        parser.add_argument("--preset", choices=list(presets), help=f"named set of values (default: {first})")
    parser.add_argument(
        "--dry-run", action="store_true", default=False, help="print the resolved configuration and the plan"
    )
    parser.add_argument("--debug", action="store_true", default=False, help="show tracebacks")
    return parser


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100


def _fields(stage: type[CommandConfig], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for key, field in stage.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, CommandConfig):
            yield from _fields(kind, f"{prefix}{key}.")
        else:
            yield prefix + key, field


def _add_flag(parser: argparse.ArgumentParser, dotted: str, field: FieldInfo, bare: str | None) -> None:
    default = "" if field.is_required() or field.default in (None, "") else f" (default: {_shown(field)})"
    text = (field.description or "").replace("%", "%%") + default.replace("%", "%%")
    flag = _flag(dotted)
    kind = _plain_type(field.annotation)
    options: dict[str, Any] = {"dest": dotted, "help": text}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is dict:
        options |= {"type": _json, "metavar": "JSON"}
    else:
        options["metavar"] = dotted.rsplit(".", 1)[-1].upper()
    if bare is not None:
        options |= {"nargs": "?", "const": bare}
    parser.add_argument(flag, **options)


def _flag(dotted: str) -> str:
    return f"--{dotted.replace('_', '-')}"


def _plain_type(annotation: Any) -> Any:
    """The one type beside None of an optional field."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def _shown(field: FieldInfo) -> str:
    return str(field.get_default(call_default_factory=True, validated_data={}))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None
