"""kill -9 of the driver at any moment, again and again: the outcome equals an undisturbed run's."""

import random
from pathlib import Path

import pytest

from tests.commands import committed, kill, rows, sharegpt4v, start, wait_for_commits, write_images

IMAGES = 480
PER_COMMIT = 4
COMMITS = IMAGES // PER_COMMIT


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good ones, one that is no image, one that only a second attempt captions."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [f"coco/{index:04}.jpg" for index in range(IMAGES)])
    (folder / "coco" / "0100.jpg").write_bytes(b"<html>not found</html>")
    return folder


def _arguments(images: Path, run: Path, seconds: float = 0.05) -> list[str]:
    return [
        *("caption", "--images", str(images), "--out", str(run), "--engine", "fake"),
        *("--fake.seconds-per-request", str(seconds), "--rows-per-commit", str(PER_COMMIT)),
        *("--fake.faults", '{"once": "0200", "refusal": "0300"}', "--fake.image-size", "24"),
    ]


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sharegpt4v(*_arguments(images, run, seconds=0.0))
    assert done.returncode == 0, done.stderr
    assert (len(rows(run, "captions")), len(rows(run, "rejects"))) == (IMAGES - 2, 2)
    return run


def _kill_and_compare(images: Path, run: Path, undisturbed: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    landed = 0
    while landed < kills:
        process = start(*_arguments(images, run))
        wait_for_commits(process, run, committed(run) + draw.randint(1, COMMITS // (2 * kills)))
        if process.poll() is not None:
            assert process.wait() == 0, process.communicate()[1]
            break
        kill(process)
        landed += 1
        assert not (run / "_SUCCESS").exists()
    assert landed == kills, f"the run ended after {landed} kills"
    last = sharegpt4v(*_arguments(images, run, seconds=0.0))
    assert last.returncode == 0, last.stderr
    assert (run / "_SUCCESS").exists()
    for part in ("captions", "rejects"):
        assert rows(run, part).equals(rows(undisturbed, part)), part


def test_three_kills_cost_nothing(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    _kill_and_compare(images, tmp_path / "run", undisturbed, kills=3, seed=random.randrange(1_000_000))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_cost_nothing(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    _kill_and_compare(images, tmp_path / "run", undisturbed, kills=20, seed=random.randrange(1_000_000))


def test_a_rerun_of_a_finished_run_writes_nothing(images: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.parquet")}
    again = sharegpt4v(*_arguments(images, undisturbed))
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.parquet")} == before
