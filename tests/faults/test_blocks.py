"""Blocks of several commits, which small runs do not have by themselves."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sharegpt4v.captions import blocks
from tests.commands import rows, write_images


def test_a_worker_that_dies_inside_a_block_costs_no_commit_and_counts_none_twice(
    caption_there: "Callable[..., subprocess.CompletedProcess[str]]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "FEW_BLOCKS", 4)
    monkeypatch.setattr(blocks, "LEAD", 2)
    names = [f"{index:03}.jpg" for index in range(124)]
    write_images(tmp_path / "images", names)
    run = tmp_path / "run"
    done = caption_there(
        *("--images", tmp_path / "images", "--out", run, "--engine", "fake", "--rows-per-commit", "4"),
        *("--fake.faults", json.dumps({"kill": "033"}), "--actors", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert rows(run, "rejects")["id"].to_pylist() == ["033.jpg"]
    assert rows(run, "captions")["id"].to_pylist() == [name for name in names if name != "033.jpg"]
    assert "captioned 124 of 124" in done.stderr, done.stderr
    commits = json.loads((run / "summary.json").read_text())["commits"]
    assert [commit["rows"] for commit in commits] == [4] * 31
