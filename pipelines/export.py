"""Hand a finished run on: `python -m pipelines.export --run RUN --format llava-json|hf|webdataset`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.command_line import run_command
from sharegpt4v.captions.export.write import export_run
from sharegpt4v.config.export import ExportConfig
from sharegpt4v.run.settings import read_settings

_SUFFIX = {"llava-json": ".json", "hf": "-hf", "webdataset": "-wds"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 written, 2 wrong request."""
    return run_command("export", ExportConfig, export, sys.argv[1:] if argv is None else argv)


def export(config: ExportConfig) -> int:
    """Writes the run in the wanted format and says where it stands."""
    settings = read_settings(config.run)
    out = config.out or _beside(config.run, config.format)
    summary = export_run(config.run, config.format, out, root=config.root or settings["root"])
    print(f"{summary.captions:,} captions written to {out}")
    return 0


def _beside(run: Path, kind: str) -> Path:
    run = run.resolve()
    return run.with_name(run.name + _SUFFIX[kind])


if __name__ == "__main__":
    sys.exit(main())
