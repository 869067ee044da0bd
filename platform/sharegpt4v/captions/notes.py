"""Small JSON files of a run folder: a damaged one costs what it says, never the run."""

import json
from pathlib import Path
from typing import Any

from sharegpt4v.errors import UserError


def read_note(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None where the file is gone, or a crash or full disk has damaged it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: no UTF-8, no JSON
        return None
    return content if isinstance(content, dict) else None


def read_summary(run: Path) -> dict[str, Any]:
    """Reads summary.json of a finished run. Raises UserError for a damaged one, and for a training run's."""
    summary = read_note(run / "summary.json")
    if summary is None:
        raise UserError(
            f"{run}/summary.json is gone or damaged: the run's `sharegpt4v caption` writes it again"
        )
    if "captions" not in summary:
        raise UserError(f"{run} is no captioning run: its summary.json counts no captions")
    return summary
