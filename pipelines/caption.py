"""Caption every image of a manifest, each exactly once: `python -m pipelines.caption --images DIR --out RUN`.

The flow itself, from the manifest to the report, is in pipelines/steps/caption_job.py.
"""

import sys
from collections.abc import Sequence

from cluster.command_line import Command, run_command
from sharegpt4v.config.caption import CaptionConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 stopped, 2 wrong request, 130 interrupted."""
    return run_command(COMMAND, argv)


def caption(config: CaptionConfig) -> int:
    """Begins or resumes the run, and returns the exit code."""
    from pipelines.steps.caption_job import run_caption  # imports ray and torch

    return run_caption(config)


def plan(config: CaptionConfig) -> str:
    """Looks at what would run and says so in a few lines; writes nothing."""
    from pipelines.steps.dry_run import describe_job

    return describe_job(config)


COMMAND = Command("caption", CaptionConfig, caption, plan)

if __name__ == "__main__":
    sys.exit(main())
