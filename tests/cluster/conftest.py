"""One set of images and one undisturbed local run, which every run on a cluster has to equal."""

from pathlib import Path

import pytest
from PIL import Image

from tests.commands import rows, sharegpt4v, write_images

IMAGES = 160
PER_COMMIT = 4


def arguments(images: Path, run: Path, seconds: float) -> list[str]:
    """seconds: time each caption takes; it changes no row."""
    return [
        *("caption", "--images", str(images), "--out", str(run), "--engine", "fake"),
        *("--fake.seconds-per-request", str(seconds), "--rows-per-commit", str(PER_COMMIT)),
        *("--fake.image-size", "24"),
    ]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good ones, one that is no image, and four in one commit that take a while to decode."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [f"coco/{index:03}.jpg" for index in range(IMAGES)])
    for index in range(4):
        Image.new("RGB", (5000, 5000), (60 * index, 90, 120)).save(folder / "coco" / f"00{index}.jpg")
    (folder / "coco" / "100.jpg").write_bytes(b"<html>not found</html>")
    return folder


@pytest.fixture(scope="session")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sharegpt4v(*arguments(images, run, seconds=0.0))
    assert done.returncode == 0, done.stderr
    assert (len(rows(run, "captions")), len(rows(run, "rejects"))) == (IMAGES - 1, 1)
    return run


def assert_same_outcome(run: Path, undisturbed: Path) -> None:
    """Every id once, in the same order, with the same caption or reason; and the run is finished."""
    assert (run / "_SUCCESS").exists()
    for part in ("captions", "rejects"):
        assert rows(run, part).equals(rows(undisturbed, part)), part
