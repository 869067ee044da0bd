"""Look at every image of a manifest without a model: `python -m pipelines.check --images DIR`.

Reports what is missing, broken, oversized or there twice, by source, before a captioner costs anything.
"""

import sys
from collections.abc import Sequence

from cluster.command_line import Command, run_command
from sharegpt4v.collector import collector_paused
from sharegpt4v.config.check import CheckConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 looked, 1 found something and --strict is given, 2 wrong request."""
    return run_command(COMMAND, argv)


def check(config: CheckConfig) -> int:
    """Looks at every image, and returns the exit code."""
    with collector_paused():
        from pipelines.steps.check_job import run_check  # imports ray

    return run_check(config)


COMMAND = Command("check", CheckConfig, check)

if __name__ == "__main__":
    sys.exit(main())
