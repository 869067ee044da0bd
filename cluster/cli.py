"""The command line `sharegpt4v COMMAND [flags]`: each command is a module that imports its work late."""

import atexit
import gc
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter

from cluster.command_line import call, command_app
from cluster.errors import EXIT_USAGE

COMMANDS = {
    "check": "pipelines.check",
    "caption": "pipelines.caption",
    "train": "pipelines.train",
    "compare": "pipelines.compare",
    "export": "pipelines.export",
    "convert": "pipelines.convert",
    "serve": "serve.app",
    "demo": "serve.demo",
}
"""The module that holds each COMMAND, in data order."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command, 2 when there is no such command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    atexit.register(gc.freeze)  # else Python's last collection visits all objects once more, for 0.3 s
    app = application()
    if not arguments:
        app.help_print([])
        return EXIT_USAGE
    return call(app, arguments, f"sharegpt4v {arguments[0]}" if arguments[0] in COMMANDS else "sharegpt4v")


def application() -> App:
    """Makes the app of all commands, their help, and the installation of completion."""
    app = App(
        name="sharegpt4v",
        help="Caption, train, evaluate and serve ShareGPT4V on Ray.",
        help_format="plaintext",
        help_epilogue="sharegpt4v COMMAND --help lists its flags: the fields of its configuration file.",
        version=lambda: f"sharegpt4v {importlib.metadata.version('sharegpt4v-platform')}",
    )
    app["--help"].group = app["--version"].group = "Flags"
    for place, module in enumerate(COMMANDS.values()):
        app.command(command_app(importlib.import_module(module).COMMAND, place))
    app.register_install_completion_command(
        "completion", help="Install completion in bash, zsh or fish.", sort_key=len(COMMANDS)
    )

    @app.command(name="help", sort_key=len(COMMANDS) + 1)
    def show_help(command: Annotated[str | None, Parameter(choices=tuple(COMMANDS))] = None, /) -> None:
        """Show the help of a command."""
        app.help_print([command] if command else [])

    return app


if __name__ == "__main__":
    sys.exit(main())
