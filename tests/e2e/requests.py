"""Requests to `caption` that are judged before Ray starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import caption as command
from sharegpt4v.captions.layout import CaptionRun
from tests.captions.sessions import caption, reject
from tests.captions.sessions import commit as commit_rows

FAKE = ("--engine", "fake", "--fake.image-side", "24")


def request(images: str | Path, out: str | Path, *more: str | Path) -> int:
    """The exit code: 130 for what was not refused, with the fixture `no_ray`."""
    return command.main([str(part) for part in ("--images", images, "--out", out, *FAKE, *more)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the one line of a refused request says."""
    capsys.readouterr()
    assert request(*arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if " s  reading " not in line]
    assert len(lines) == 1 and lines[0].startswith("sharegpt4v caption: "), printed.err
    assert printed.out == ""
    return lines[0].removeprefix("sharegpt4v caption: ")


def commit(run: Path, *keys: str, rejected: bool = False, session: int = 0) -> None:
    """Images as an earlier session has committed them."""
    held = CaptionRun(run)
    rows = [reject(held, key) if rejected else caption(held, key) for key in keys]
    commit_rows(held, session, f"x{keys[0].replace('/', '-')}", *rows)


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
