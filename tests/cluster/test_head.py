"""A cluster started by `ray start --head`: drivers outside and submitted jobs do what a local run does.

Its nodes' interpreter lacks our packages, so that all code comes with the runtime environment, and it asks
for a token, which `ray start` turns on by itself when the operator has one.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.heads import Head, bare_python, head, token_environment
from tests.commands import REPOSITORY, command
from tests.undisturbed import arguments, assert_same_outcome

pytestmark = pytest.mark.workers


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of somebody who holds the cluster's token and set what the error names."""
    return token_environment(tmp_path_factory.mktemp("token")) | {"RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def cluster(user: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    python = bare_python(tmp_path_factory.mktemp("python"))
    seen = subprocess.run([python, "-c", "import ray, sharegpt4v"], capture_output=True, text=True, cwd="/")
    assert "No module named 'sharegpt4v'" in seen.stderr  # and ray is there
    with head(python, user, job_server=True) as started:
        yield started


def _run(words: list[str], user: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, cwd=REPOSITORY, env=user, capture_output=True, text=True, timeout=180)


def _submit(cluster: Head, user: dict[str, str], words: list[str]) -> "subprocess.CompletedProcess[str]":
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    job = ["job", "submit", "--address", cluster.jobs, "--runtime-env", "cluster/runtime_env.yaml", "--"]
    plain = {key: value for key, value in user.items() if key != "PYTHONPATH"}
    return _run([*ray, *job, *words], plain)


def test_a_driver_outside_does_what_a_local_run_does(
    cluster: Head, user: dict[str, str], images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(*arguments(images, run, seconds=0.0), "--address", cluster.address)
    done = _run(words, user)
    assert done.returncode == 0, done.stderr
    assert f"connecting to Ray at {cluster.address}" in done.stderr
    assert_same_outcome(run, undisturbed)


def test_a_submitted_job_does_what_a_local_run_does(
    cluster: Head, user: dict[str, str], images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _, *flags = arguments(images, run, seconds=0.0)
    done = _submit(cluster, user, ["python", "-m", "pipelines.caption", *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_outcome(run, undisturbed)


def test_a_job_refuses_a_relative_out_which_would_vanish_with_its_working_directory(
    cluster: Head, user: dict[str, str], images: Path
) -> None:
    words = ["python", "-m", "cluster.cli", "caption", "--images", str(images), "--out", "my-run"]
    done = _submit(cluster, user, words)
    assert done.returncode == 1
    assert "sharegpt4v caption: --out my-run is relative" in done.stdout
    assert "exit code 2" in done.stdout


def test_a_driver_without_the_token_is_told_what_is_missing(
    cluster: Head, user: dict[str, str], images: Path, tmp_path: Path
) -> None:
    nobody = {key: value for key, value in user.items() if not key.startswith("RAY_AUTH")}
    words = command(*arguments(images, tmp_path / "run", seconds=0.0), "--address", cluster.address)
    done = _run(words, nobody | {"RAY_NUM_REDIS_GET_RETRIES": "3"})
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert f"cannot reach Ray at {cluster.address}" in line and "RAY_AUTH_TOKEN_PATH" in line
    assert "Traceback" not in done.stderr
