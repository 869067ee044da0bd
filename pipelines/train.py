"""Train one stage of either model: `python -m pipelines.train sft --data talk.json --out RUN`.

The flow itself, from the data to the end product, is in pipelines/steps/training.py.
"""

import sys
from collections.abc import Sequence

from cluster.command_line import Command, CommandGroup, run_command
from sharegpt4v.collector import collector_paused
from sharegpt4v.config.train import CONFIGS, TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 stopped, 2 wrong request, 130 interrupted."""
    return run_command(COMMAND, argv)


def train(config: TrainConfig) -> int:
    """Begins or resumes the run, and returns the exit code."""
    with collector_paused():
        from pipelines.steps.training import run_train  # imports ray and torch

    return run_train(config)


def plan(config: TrainConfig) -> str:
    """Describes what would run, in a few lines; writes nothing."""
    from pipelines.steps.training import describe

    return describe(config)


COMMAND = CommandGroup(
    "train",
    "Train the captioner, or a stage of ShareGPT4V.",
    {stage: Command(f"train {stage}", config, train, plan) for stage, config in CONFIGS.items()},
)

if __name__ == "__main__":
    sys.exit(main())
