"""A cluster started as the README says: drivers and submitted jobs do what a local run does.

Its nodes' interpreter lacks our packages, so that all code comes with the runtime environment. 600 MB of
weights lie in the folder from which commands are typed: more than Ray takes.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import Head, bare_python, head
from tests.commands import REPOSITORY, command, environment, rows, write_images
from tests.undisturbed import arguments, assert_same_outcome

pytestmark = pytest.mark.workers

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BEFORE, AFTER = (
    part.strip().splitlines()
    for part in README.split("## On a cluster\n")[1].split("```\n")[1].split("ray start --head\n")
)
"""The README's lines for a cluster, before and after the one that starts it."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our packages, a few images and large weights."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("platform", "pipelines", "serve", "cluster"):
        (folder / name).symlink_to(REPOSITORY / name)
    write_images(folder / "toy-images", [f"{index}.jpg" for index in range(4)])
    (folder / "models").mkdir()
    with (folder / "models" / "model.safetensors").open("wb") as file:
        file.truncate(600 * 2**20)
    return folder


@pytest.fixture(scope="module")
def user(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of somebody with a new home directory who typed the README's lines about the token."""
    home = tmp_path_factory.mktemp("home")
    scripts = home / "bin"
    scripts.mkdir()
    for name, module in {"sharegpt4v": "cluster.cli", "ray": "ray.scripts.scripts", "python": ""}.items():
        run = f"{sys.executable} {f'-m {module}' if module else ''}"
        (scripts / name).write_text(f'#!/bin/sh\nexec {run} "$@"\n')
        (scripts / name).chmod(0o755)
    kept = {key: value for key, value in environment().items() if not key.startswith("RAY_")}
    new = kept | {"HOME": str(home), "PATH": f"{scripts}{os.pathsep}{kept['PATH']}"}
    assert "export RAY_AUTH_MODE=token" in BEFORE
    done = _type(BEFORE, checkout, new)
    assert done.returncode == 0, done.stderr
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    return new | {"RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def cluster(user: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    python = bare_python(tmp_path_factory.mktemp("python"))
    seen = subprocess.run(
        [python, "-I", "-c", "import ray, sharegpt4v"], capture_output=True, text=True, cwd="/"
    )
    assert "No module named 'sharegpt4v'" in seen.stderr  # and ray is there
    with head(python, user, job_server=True) as started:
        yield started


def _run(words: list[str], folder: Path, user: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, cwd=folder, env=user, capture_output=True, text=True, timeout=240)


def _type(lines: list[str], folder: Path, user: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return _run(["bash", "-c", "\n".join(["set -e", *lines])], folder, user)


def _submit(
    cluster: Head, checkout: Path, user: dict[str, str], words: list[str]
) -> "subprocess.CompletedProcess[str]":
    job = ["job", "submit", "--address", cluster.jobs, "--runtime-env", "cluster/runtime_env.yaml", "--"]
    return _run(["ray", *job, *words], checkout, user)


def test_the_lines_of_the_readme_run_as_typed(cluster: Head, checkout: Path, user: dict[str, str]) -> None:
    typed = "\n".join(AFTER)
    for documented, started in {
        "127.0.0.1:6379": cluster.address,
        "http://127.0.0.1:8265": cluster.jobs,
    }.items():
        assert documented in typed
        typed = typed.replace(documented, started)
    done = _type([typed], checkout, user)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for run in ("cluster", "job"):
        assert (checkout / "runs" / run / "_SUCCESS").exists()
    assert rows(checkout / "runs" / "job", "captions").equals(rows(checkout / "runs" / "cluster", "captions"))


def test_the_line_that_refuses_a_job_server_runs_as_typed(
    cluster: Head, checkout: Path, user: dict[str, str], images: Path, tmp_path: Path
) -> None:
    """From another folder than the checkout, as with an installed wheel."""
    _, *flags = arguments(checkout / "toy-images", tmp_path / "run", seconds=0.0)
    refused = _run(command("caption", *flags, "--address", cluster.jobs), tmp_path, user)
    assert refused.returncode == 2
    line = re.findall(r"`(ray job submit .*) \.\.\.`", refused.stderr)[0]
    done = _type([f"{line} {shlex.join(flags)}"], tmp_path, user)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(tmp_path / "run", "captions")) == 4


def test_a_driver_outside_does_what_a_local_run_does(
    cluster: Head, checkout: Path, user: dict[str, str], images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(*arguments(images, run, seconds=0.0), "--address", cluster.address)
    done = _run(words, checkout, user)
    assert done.returncode == 0, done.stderr
    assert f"connecting to Ray at {cluster.address}" in done.stderr
    assert_same_outcome(run, undisturbed)


def test_a_submitted_job_does_what_a_local_run_does(
    cluster: Head, checkout: Path, user: dict[str, str], images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _, *flags = arguments(images, run, seconds=0.0)
    done = _submit(cluster, checkout, user, ["python", "-m", "pipelines.caption", *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_outcome(run, undisturbed)


def test_a_job_refuses_a_relative_out_which_would_vanish_with_its_working_directory(
    cluster: Head, checkout: Path, user: dict[str, str], images: Path
) -> None:
    words = ["python", "-m", "cluster.cli", "caption", "--images", str(images), "--out", "my-run"]
    done = _submit(cluster, checkout, user, words)
    assert done.returncode == 1
    assert "sharegpt4v caption: --out my-run is relative" in done.stdout
    assert "exit code 2" in done.stdout


@pytest.mark.parametrize(
    ("token", "mode", "remedy"),
    [
        (None, None, "copy ~/.ray/auth_token of its head to {} and `export RAY_AUTH_MODE=token`"),
        (None, "token", "copy ~/.ray/auth_token of its head to {}"),
        ("right", None, "`export RAY_AUTH_MODE=token`, and Ray sends the one in {}"),
        ("wrong", "token", "copy ~/.ray/auth_token of its head to {}"),
    ],
)
def test_a_driver_whose_token_is_not_taken_is_told_the_remedy(
    token: str | None,
    mode: str | None,
    remedy: str,
    cluster: Head,
    checkout: Path,
    user: dict[str, str],
    tmp_path: Path,
) -> None:
    own = tmp_path / ".ray" / "auth_token"
    own.parent.mkdir()
    if token:
        right = (Path(user["HOME"]) / ".ray" / "auth_token").read_text()
        own.write_text(right if token == "right" else "cd" * 32)
    user = {key: value for key, value in user.items() if key != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    words = command(
        *arguments(checkout / "toy-images", tmp_path / "run", seconds=0.0), "--address", cluster.address
    )
    done = _run(words, checkout, user | ({"RAY_AUTH_MODE": mode} if mode else {}))
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"sharegpt4v caption: Ray at {cluster.address} ")
    assert line.endswith(remedy.format(own))
    assert "Traceback" not in done.stderr
