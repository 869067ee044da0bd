"""Two captioning runs, or two of training, side by side: `python -m pipelines.compare --a RUN --b RUN`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.command_line import Command, run_command
from sharegpt4v.config.compare import CompareConfig
from sharegpt4v.errors import UserError

METRICS = "metrics.jsonl"
"""What a training run has and a captioning run has not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 wrong request."""
    return run_command(COMMAND, argv)


def compare(config: CompareConfig) -> int:
    """Writes the page and says how many images the runs have in common."""
    from sharegpt4v.captions.compare import write_comparison  # imports pyarrow

    out = config.out or _beside(config.a, config.b)
    if out.suffix != ".html":
        raise UserError(f"{out} is no name of a page: give one that ends in .html", field="out")
    if all((run / METRICS).exists() for run in (config.a, config.b)):
        return _compare_training(config.a, config.b, out)
    overlap = write_comparison(config.a, config.b, out)
    print(
        f"{overlap.both:,} images were captioned by both, {overlap.same_text:,} of them with equal captions; "
        f"{overlap.only_a:,} by A alone, {overlap.only_b:,} by B alone"
    )
    print(f"page: {out}")
    return 0


def _compare_training(a: Path, b: Path, out: Path) -> int:
    from sharegpt4v.train.report import write_report  # imports plotly

    write_report([a, b], out)
    print(f"page: {out}")
    return 0


def _beside(a: Path, b: Path) -> Path:
    first = a.resolve()
    return first.with_name(f"{first.name}-vs-{b.resolve().name}.html")


COMMAND = Command("compare", CompareConfig, compare)

if __name__ == "__main__":
    sys.exit(main())
