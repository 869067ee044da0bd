"""What a run of pytest leaves out: suites with a make target of their own, and the table of several runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, environment
from tests.skips import SUITES

TESTS = """
import pytest

pytest.importorskip("{package}")

def test_plain() -> None: ...

@pytest.mark.browser
def test_page() -> None: ...

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.skipif(True, reason="there is no GPU")
def test_card(number: int) -> None: ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of tests: in the first one passes and three are skipped, the second is skipped as a whole."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = browser\n")
    (tmp_path / "test_a.py").write_text(TESTS.format(package="pytest"))
    (tmp_path / "test_b.py").write_text(TESTS.format(package="not_to_be_had"))
    return tmp_path


def _python(*arguments: str | Path) -> str:
    """What it prints; a run in which all is skipped ends with an error."""
    words = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    return done.stdout


def _pytest(folder: Path, *arguments: str | Path) -> str:
    plain = ("pytest", "-q", "-p", "tests.skips", "-c", folder / "pytest.ini", "--rootdir", folder)
    return _python(*plain, *arguments)


def test_one_table_holds_what_several_runs_skipped(folder: Path) -> None:
    file = folder / "skipped"
    _pytest(folder, "--skipped-to", file, "-n", "2", folder / "test_a.py")
    _pytest(folder, "--skipped-to", file, folder / "test_b.py")
    said = " ".join(_python("tests.skips", file).split())
    assert "skipped tests: 4" in said
    assert "2 │ test_a.py │ there is no GPU" in said
    assert "1 │ test_a.py │ left to make test-browser" in said
    assert "1 │ test_b.py │ could not import 'not_to_be_had'" in said


def test_a_suite_runs_once_it_is_asked_for(folder: Path) -> None:
    assert "1 passed, 3 deselected" in _pytest(folder, "-m", "browser", folder / "test_a.py")


def test_every_suite_is_a_marker_that_pytest_knows() -> None:
    known = _python("pytest", "--markers")
    for suite in SUITES:
        assert f"@pytest.mark.{suite}:" in known, suite
