"""`sharegpt4v demo`: a page to chat about images and to caption them, a process of its own over the API."""

import sys
from collections.abc import Sequence

from cluster.command_line import Command, run_command
from sharegpt4v.config.demo import DemoConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended by a signal, 2 wrong request."""
    return run_command(COMMAND, argv)


def demo(config: DemoConfig) -> int:
    """Serves the page until Ctrl-C."""
    from serve.demo.launch import launch  # imports gradio

    return launch(config)


COMMAND = Command("demo", DemoConfig, demo)

if __name__ == "__main__":
    sys.exit(main())
