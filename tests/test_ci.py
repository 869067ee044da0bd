"""What .ci/run runs, in which order and where, and what the Makefile installs for that."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import REPOSITORY
from tests.skips import SUITES

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CI = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
INSTALLERS = ("pip", "apt-get")


def _script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The commands of .ci/run that do something, in order, on a machine without a browser.

    `make` adds a word: `clean` where it is run in a clone of this commit that holds nothing else.
    """
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone, which .ci/run would clone")
    folder = tmp_path_factory.mktemp("ci")
    tools, written = folder / "tools", folder / "log"
    for name in ("bash", "sh", "dirname", "mktemp", "rm", "ln", "git"):
        found = shutil.which(name)
        assert found
        _script(tools / name, f'exec {found} "$@"')
    for name in INSTALLERS:
        _script(tools / name, f'echo {name} "$@" >> {written}')
    _script(tools / "id", "echo 0")
    same = f'[ "$(git rev-parse HEAD)" = "$(git -C {REPOSITORY} rev-parse HEAD)" ]'
    _script(
        tools / "make",
        f'{same} && [ "$PWD" != "{REPOSITORY}" ] && [ -z "$(git status --short --ignored)" ] && state=clean',
        f'echo make "$@" $state >> {written}',
    )
    environment = os.environ | {"PATH": str(tools), "TMPDIR": str(folder)}
    subprocess.run([REPOSITORY / ".ci" / "run"], env=environment, check=True, timeout=60)
    return written.read_text().splitlines()


def test_the_commands_of_the_readme_come_first_and_in_an_empty_clone(log: list[str]) -> None:
    assert README.index("```sh\nmake quickstart\n```") < README.index("`make test`")
    assert log[:2] == ["make quickstart clean", "make test clean"]


def test_extras_and_packages_of_the_system_come_after_them(log: list[str]) -> None:
    installing = [n for n, line in enumerate(log) if line.startswith(INSTALLERS) or "test-kernels" in line]
    assert len(installing) >= 3 and min(installing) > log.index("make lint clean") > 1


def test_every_suite_but_two_is_run(log: list[str]) -> None:
    """All but the one that takes longer than all others together, and vLLM's, of another environment."""
    run = {line.split()[1] for line in log if line.startswith("make ")} | {"test-long", "test-vllm"}
    assert run >= {target for target in TARGETS if target.startswith("test")}
    assert run >= {f"test-{suite}" for suite in SUITES}


def test_before_the_extras_pip_installs_the_package_with_its_tools_for_development_alone(
    tmp_path: Path,
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(REPOSITORY / name, tmp_path)
    words = ["make", "--dry-run", "setup", "quickstart", "test", "lint"]
    planned = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    installed = [
        line.split(" -c constraints.txt ")[1] for line in planned.splitlines() if "pip install" in line
    ]
    assert installed == ["torch", "-e '.[dev]'"]


@pytest.mark.parametrize("text", [CI, README], ids=["ci", "readme"])
def test_every_target_that_is_named_exists(text: str) -> None:
    named = set(re.findall(r"(?:`|^|&& )make ([a-z0-9-]+)", text, re.MULTILINE))
    assert len(named) >= 3 and named <= TARGETS


@pytest.mark.parametrize("failing", ["none", "-n 2", "tests/faults"])
def test_both_halves_of_the_tests_run_and_either_fails_them(tmp_path: Path, failing: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(REPOSITORY / name, tmp_path)
    _script(
        tmp_path / ".venv" / "bin" / "python",
        'echo "$@" >> log',
        f'case "$*" in *pytest*" {failing}"*) exit 1;; esac',
    )
    (tmp_path / ".venv" / ".installed").touch()
    done = subprocess.run(["make", "test"], cwd=tmp_path, capture_output=True, timeout=60)
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[1] for line in log] == ["pytest", "pytest", "tests.skips"]
    assert (done.returncode == 0) == (failing == "none")
