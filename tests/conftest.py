"""The images of tests.undisturbed and their plain run, made once for all that compare with it."""

from pathlib import Path

import pytest

from tests.commands import rows, sharegpt4v
from tests.undisturbed import IMAGES, arguments, make_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_images(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sharegpt4v(*arguments(images, run, seconds=0.0))
    assert done.returncode == 0, done.stderr
    assert (len(rows(run, "captions")), len(rows(run, "rejects"))) == (IMAGES - 2, 2)
    return run
