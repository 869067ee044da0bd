"""Ray itself dies under a local run: the command ends soon, says why and what to do, and can be repeated."""

import time
from pathlib import Path

import pytest

from tests.cluster.processes import kill_one
from tests.commands import committed, sharegpt4v, start, wait_for_commits
from tests.undisturbed import arguments, assert_same_outcome

pytestmark = pytest.mark.faults


def _run_until_death(process_of_ray: str, images: Path, run: Path) -> str:
    """Kills it after two commits; returns the last line the command said, which must come in 20 s."""
    process = start(*arguments(images, run, seconds=0.3))
    try:
        wait_for_commits(process, run, 2)
        kill_one(process.pid, process_of_ray)
        killed = time.monotonic()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - killed < 20
    assert process.returncode == 1
    assert "Traceback" not in said
    assert not (run / "_SUCCESS").exists()
    return said.strip().splitlines()[-1]


def test_a_run_whose_raylet_died_says_so_and_goes_on_from_its_last_commit(
    images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = _run_until_death("/raylet/raylet ", images, run)
    assert "Ray's node at" in line and "what was committed is kept: run the same command again" in line
    kept = committed(run)
    assert kept >= 2

    again = sharegpt4v(*arguments(images, run, seconds=0.0))
    assert again.returncode == 0, again.stderr
    assert "\n0 of 160 images are done" not in again.stderr
    assert_same_outcome(run, undisturbed)


def test_a_run_whose_head_died_ends_before_ray_ends_it_without_a_word(images: Path, tmp_path: Path) -> None:
    line = _run_until_death("/gcs_server ", images, tmp_path / "run")
    assert "Ray's head at" in line and "what was committed is kept: run the same command again" in line
