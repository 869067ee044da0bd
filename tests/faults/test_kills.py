"""kill -9 of the driver at any moment, again and again: the outcome equals an undisturbed run's."""

import random
from pathlib import Path

import pytest

from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.outcomes import outcome_files, read_outcomes
from tests.commands import committed, kill, sharegpt4v, start, wait_for_commits
from tests.undisturbed import COMMITS, arguments, assert_same_outcome

pytestmark = pytest.mark.faults


def _kill_and_compare(images: Path, run: Path, undisturbed: Path, kills: int, seed: int) -> None:
    """Each kill comes after a drawn number of commits; the first also tears one, as a power cut does."""
    draw = random.Random(seed)
    landed = 0
    while landed < kills:
        process = start(*arguments(images, run, seconds=0.2))
        wait_for_commits(process, run, committed(run) + draw.randint(1, max(3, COMMITS // (4 * kills))))
        if process.poll() is not None:
            assert process.wait() == 0, process.communicate()[1]
            break
        kill(process)
        landed += 1
        assert not (run / "_SUCCESS").exists()
        if landed == 1:
            _tear_a_commit(CaptionRun(run))
    assert landed == kills, f"the run ended after {landed} kills"
    last = sharegpt4v(*arguments(images, run, seconds=0.0))
    assert last.returncode == 0, last.stderr
    assert_same_outcome(run, undisturbed)


def _tear_a_commit(run: CaptionRun) -> None:
    torn = outcome_files(run)[0]
    content = torn.read_bytes()
    torn.write_bytes(bytes(200) + content[200:])  # blocks that never reached the disk; the footer did
    assert read_outcomes(torn) is None


def test_three_kills_and_a_torn_file_cost_nothing(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    _kill_and_compare(images, tmp_path / "run", undisturbed, kills=3, seed=random.randrange(1_000_000))


@pytest.mark.timeout(1500)
def test_twenty_kills_cost_nothing(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    _kill_and_compare(images, tmp_path / "run", undisturbed, kills=20, seed=random.randrange(1_000_000))


def test_a_rerun_of_a_finished_run_writes_nothing(images: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.parquet")}
    again = sharegpt4v(*arguments(images, undisturbed, seconds=0.0))
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.parquet")} == before
