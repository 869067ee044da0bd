"""Command-line flags that ARE configuration fields, and the one way commands end.

sharegpt4v caption --images photos --out run --decoding.max-new-tokens 200
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import yaml
from cyclopts import App, CycloptsError

from cluster.errors import EXIT_INTERRUPTED, EXIT_PROBLEM, EXIT_USAGE
from cluster.parameters import bare_values, field_name, flags, help_formatter, signature, usage, with_flags
from sharegpt4v.config.base import CommandConfig, flat_values, resolve
from sharegpt4v.config.yaml_file import load_yaml
from sharegpt4v.credentials import all_without_credentials, without_credentials
from sharegpt4v.errors import RunFailed, UserError

C = TypeVar("C", bound=CommandConfig)


@dataclass(frozen=True, slots=True)
class Command(Generic[C]):
    """What `sharegpt4v NAME` is; its flags are the fields of `config_class`.

    action: does the work and returns the exit code; it imports what is heavy, for help and mistakes need not
    wait for that. plan: what --dry-run prints beside the resolved configuration.
    """

    name: str
    config_class: type[C]
    action: Callable[[C], int]
    plan: Callable[[C], str] | None = None


@dataclass(frozen=True, slots=True)
class CommandGroup:
    """Commands that share a word: `sharegpt4v NAME MEMBER`. text: what they have in common, in one line.

    members: by their own word, in order.
    """

    name: str
    text: str
    members: Mapping[str, Command[Any]]


def commands_of(command: Command[Any] | CommandGroup) -> list[Command[Any]]:
    """Returns the command itself, or the members of a group."""
    return list(command.members.values()) if isinstance(command, CommandGroup) else [command]


def run_command(command: Command[C] | CommandGroup, argv: Sequence[str] | None = None) -> int:
    """Parses the flags of one command, those of this process without `argv`, and runs it.

    Returns the exit code: the action's own, 2 for a UserError, 1 for any other failure, 130 for Ctrl-C. Each
    failure is one line on stderr; --debug shows its traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return call(command_app(command), arguments, f"sharegpt4v {command.name}")


def command_app(command: Command[C] | CommandGroup, place: int = 0) -> App:
    """Makes cyclopts' app of a command, or of a group with an app a member.

    place: where lists of commands show it.
    """
    if isinstance(command, CommandGroup):
        return _group_app(command, place)

    def run(**given: Any) -> int:
        return _run(command, given)

    run.__signature__ = signature(command.config_class)  # type: ignore[attr-defined]
    app = App(
        name=command.name.rpartition(" ")[2],
        help=command.config_class.__doc__,
        help_epilogue="",
        usage=usage(command.name, command.config_class),
        help_format="plaintext",
        help_formatter=help_formatter(),
        sort_key=place,
    )
    app.default(run)
    return app


def _group_app(group: CommandGroup, place: int) -> App:
    app = App(
        name=group.name,
        help=group.text,
        usage=f"Usage: sharegpt4v {group.name} COMMAND",
        help_epilogue=f"sharegpt4v {group.name} COMMAND --help lists the flags of each.",
        help_format="plaintext",
        sort_key=place,
    )
    app["--help"].group = "Flags"
    for number, command in enumerate(group.members.values()):
        app.command(command_app(command, number))

    def show_help() -> int:
        app.help_print([])
        return EXIT_USAGE

    app.default(show_help)
    return app


def call(app: App, argv: Sequence[str], name: str) -> int:
    """Runs an app: its exit code, or 2 after one line on stderr for arguments it does not take."""
    try:
        code = app(list(argv), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(name, _one_line(error), EXIT_USAGE, "--debug" in argv)
    return code if isinstance(code, int) else 0


def _run(command: Command[C], given: dict[str, Any]) -> int:
    name, config_class = f"sharegpt4v {command.name}", command.config_class
    debug, dry_run = given.pop("debug", False), given.pop("dry_run", False)
    try:
        config = _resolve(config_class, given)
        if not dry_run:
            return command.action(config)
        return _show(command, config)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        return _fail(name, error_line(error, config_class), EXIT_USAGE, debug)
    except RunFailed as error:
        return _fail(name, name_flags(str(error), config_class), EXIT_PROBLEM, debug)
    except Exception as error:  # the last resort of a command: one line says why, never a bare traceback
        cause = f"{type(error).__name__}: {_one_line(error)[:300]}"
        return _fail(name, f"{cause} (--debug shows where)", EXIT_PROBLEM, debug)


def _show(command: Command[C], config: C) -> int:
    """Prints the resolved configuration and the plan; a reader that leaves early, as `head` does, may."""
    resolved = all_without_credentials(config.model_dump(mode="json"))
    plan = without_credentials(command.plan(config)) if command.plan else ""
    try:
        print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), end="")
        print(plan, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 128 + signal.SIGPIPE
    return 0


def name_flags(text: str, config_class: type[CommandConfig]) -> str:
    """Replaces the fields that a text names in backticks by flags."""
    return with_flags(text, flags(config_class))


def error_line(error: UserError, config_class: type[CommandConfig]) -> str:
    """Replaces the fields that an error names by flags: "limit: ..." becomes "--limit: ..."."""
    text = name_flags(error.text, config_class)
    return f"{flags(config_class).get(error.field, error.field)}: {text}" if error.field else text


def _fail(name: str, line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{name}: {without_credentials(line)}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _resolve(config_class: type[C], given: dict[str, Any]) -> C:
    path = given.pop("config", None)
    from_file = load_yaml(path) if path else {}
    layers: list[Mapping[str, Any]] = []
    if config_class.presets:
        # Both are taken out: the flag wins over the file's own `preset:` key, as every flag does.
        by_file, by_flag = from_file.pop("preset", None), given.pop("preset", None)
        preset = by_flag or by_file or next(iter(config_class.presets))
        if preset not in list(config_class.presets):  # a file's may be of any type, a list for example
            raise UserError(
                f"{preset!r} is unknown; known: {', '.join(config_class.presets)}", field="preset"
            )
        layers.append(config_class.presets[preset].values)
    by_field = {field_name(parameter): value for parameter, value in given.items()}
    by_field |= {name: value for name, value in bare_values(config_class).items() if by_field.get(name) == ""}
    try:
        return resolve(config_class, *layers, from_file, _nested(by_field))
    except UserError as error:
        if path and error.field not in by_field and error.field in {None, *flat_values(from_file)}:
            raise UserError(f"{error.text} (in {path})", field=error.field) from None
        raise


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
