"""When a command began: what it says of its time is its own, interpreter and imports included."""

import os
import sys
import time
from pathlib import Path

_COMMANDS = ("cluster.", "pipelines.")
"""Packages whose modules are run as commands, by `python -m`."""


def command_started() -> float:
    """Returns the unix time at which this process was started, or now where a program calls a command."""
    return process_started() if _is_command() else time.time()


def process_started() -> float:
    """Returns the unix time at which this process was started; now where there is no /proc."""
    try:
        # The command's name is in parentheses and may contain any character.
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - max(0.0, age)


def _is_command() -> bool:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name.startswith(_COMMANDS) if spec else Path(sys.argv[0]).name == "sharegpt4v"
