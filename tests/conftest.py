"""What many tests share: a cluster, and the images of tests.undisturbed with their plain run."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import rows, sharegpt4v
from tests.undisturbed import IMAGES, arguments, make_images

pytest_plugins = ["tests.skips"]


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


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a cluster that tests share: starting one for a command takes longer than captioning a few images."""
    from tests.cluster.nodes import nodes  # here: most tests need no Ray

    with nodes(4) as started:
        yield started.address


@pytest.fixture
def caption_there(
    address: str, capfd: pytest.CaptureFixture[str]
) -> "Callable[..., subprocess.CompletedProcess[str]]":
    """`sharegpt4v caption ARGUMENTS` on the shared cluster, driven by this process."""
    from pipelines import caption

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        capfd.readouterr()
        words = [*map(str, arguments), "--address", address]
        code = caption.main(words)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run
