"""Every command of the README runs as it stands there, in a folder that holds no earlier work."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, environment

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
VENV = REPOSITORY / ".venv"

needs_venv = pytest.mark.skipif(
    not (VENV / ".installed").exists(), reason="the README's commands need the .venv that `make setup` makes"
)


def _commands() -> list[str]:
    """The lines of all ```sh blocks, in order; blocks for a cluster are not marked so."""
    return [
        line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
    ]


@needs_venv
def test_the_commands_of_the_readme_run_in_order(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(REPOSITORY / name, tmp_path)  # with their times: make must see an up-to-date .venv
    (tmp_path / ".venv").symlink_to(VENV)
    commands = _commands()
    assert commands[0] == "make quickstart" and len(commands) >= 5
    script = "set -e\n" + "\n".join(f"echo '+ {line}'\n{line}" for line in commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "report: " in done.stdout
    for run in ("quickstart", "first"):
        summary = json.loads((tmp_path / "runs" / run / "summary.json").read_text())
        assert (summary["captions"], summary["rejects"]) == (200, 0)
        assert 0.5 < summary["engine_statistics"]["slot_use"] <= 1
        assert (tmp_path / "runs" / run / "report.html").stat().st_size > 100_000
    exported = json.loads((tmp_path / "runs" / "first.json").read_text())
    assert len(exported) == 200


def test_every_folder_of_the_map_exists() -> None:
    named = re.findall(r"^\| `([a-z0-9/]+)/` \|", README, re.MULTILINE)
    assert len(named) >= 6
    for folder in named:
        assert (REPOSITORY / folder).is_dir(), folder
