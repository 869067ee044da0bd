"""Released checkpoints and ours: `python -m pipelines.convert --checkpoint FOLDER --out FOLDER`."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.command_line import Command, run_command
from sharegpt4v.config.convert import ConvertConfig

if TYPE_CHECKING:
    from sharegpt4v.checkpoints.convert import Conversion


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 wrong request or a checkpoint that does not fit."""
    return run_command(COMMAND, argv)


def convert(config: ConvertConfig) -> int:
    """Plans, writes with a bar of bytes, and says where the folder is."""
    from rich.console import Console
    from rich.progress import Progress

    from sharegpt4v.checkpoints.convert import convert as write  # imports torch

    planned = _plan(config)
    print(planned.text)
    start = time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("writing", total=planned.bytes)
        write(planned, config.out, int(config.shard_gb * 1e9), lambda done: progress.advance(task, done))
    seconds = time.monotonic() - start
    rate = planned.bytes / 1e6 / max(seconds, 1e-9)
    print(f"{planned.bytes / 1e9:,.2f} GB written to {config.out} in {seconds:,.1f} s, {rate:,.0f} MB/s")
    return 0


def _plan(config: ConvertConfig) -> "Conversion":
    from sharegpt4v.checkpoints.convert import plan_conversion

    planned = plan_conversion(config.checkpoint, config.to, config.vision_tower, config.tokenizer)
    planned.check_out(config.out)
    return planned


def _plan_text(config: ConvertConfig) -> str:
    planned = _plan(config)
    return f"{planned.text}, {planned.bytes / 1e9:,.2f} GB"


COMMAND = Command("convert", ConvertConfig, convert, _plan_text)

if __name__ == "__main__":
    sys.exit(main())
