"""Hand a run on to other tools: `python -m pipelines.export --run RUN --format FORMAT`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.command_line import Command, name_flags, run_command
from sharegpt4v.captions.toy_warning import toy_warning
from sharegpt4v.config.export import ExportConfig
from sharegpt4v.run.settings import read_settings

if TYPE_CHECKING:
    from sharegpt4v.captions.export.write import ExportSummary


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 wrong request."""
    return run_command(COMMAND, argv)


def export(config: ExportConfig) -> int:
    """Writes the run in the wanted format and says what is where, and whose captions they are."""
    from pipelines.steps.export_progress import ExportProgress
    from sharegpt4v.captions.export.write import export_run  # imports pyarrow

    warning = toy_warning(read_settings(config.run)["model"])
    _say_warning(warning)
    start = time.monotonic()
    with ExportProgress() as progress:
        summary = export_run(
            config.run,
            config.format,
            config.out or _beside(config),
            root=config.root,
            with_images=config.with_images,
            partial=config.partial,
            progress=progress,
        )
    print(_result(summary, time.monotonic() - start))
    for note in _notes(summary):
        print(name_flags(note, ExportConfig), file=sys.stderr)
    if summary.hint:
        print(summary.hint)
    _say_warning(warning)
    return 0


def _beside(config: ExportConfig) -> Path:
    from sharegpt4v.captions.export.write import FORMATS

    run = config.run.resolve()
    partial = "-partial" if config.partial and not (run / "_SUCCESS").exists() else ""
    return run.with_name(run.name + partial + FORMATS[config.format].suffix)


def _say_warning(warning: str | None) -> None:
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def _result(summary: "ExportSummary", seconds: float) -> str:
    from rich.filesize import decimal

    files = f"{summary.files:,} file{'s' * (summary.files != 1)}, {decimal(summary.size)}"
    what = f"{summary.captions:,} captions"
    if summary.partial:
        rest = f"{summary.rejects:,} rejected, {summary.undone:,} not done yet"
        what = f"partial: {what} of {summary.rows:,} images ({rest})"
    return f"{what} written to {summary.out}: {files} in {seconds:,.1f} s"


def _notes(summary: "ExportSummary") -> list[str]:
    notes = list(summary.notes)
    if summary.left_out:
        notes.append(
            f"{len(summary.left_out):,} captions are left out, {summary.left_out[0]!r} for one: they hold a "
            f"tag that the readers of this format take for an image"
        )
    return notes


COMMAND = Command("export", ExportConfig, export)

if __name__ == "__main__":
    sys.exit(main())
