"""The files for `serve deploy` on a real cluster, and another version of the same application under load."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from serve.keys import digest
from tests.cluster.heads import Head, bare_python, head
from tests.commands import REPOSITORY, environment
from tests.serve.server import data_url, png, user
from tests.serve.test_on_ray import free_port

pytestmark = [pytest.mark.workers, pytest.mark.timeout(400)]

KEY = "sk-test-of-the-deployment"
BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("What is this?", data_url(png()))]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an image that has our packages installed."""
    found = bare_python(tmp_path_factory.mktemp("python"))
    (packages,) = found.parent.parent.glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text(f"{REPOSITORY / 'platform'}\n{REPOSITORY}\n")
    return found


@pytest.fixture(scope="module")
def cluster(python: Path) -> Iterator[Head]:
    base = environment() | {"RAY_AUTH_MODE": "disabled"}
    with head(python, base, job_server=True) as started:
        yield started


def _deploy(cluster: Head, python: Path, folder: Path, port: int, **changes: Any) -> None:
    """Deploys cluster/serve/one_node.yaml with the fake engine in place of models on GPUs."""
    content = yaml.safe_load((REPOSITORY / "cluster" / "serve" / "one_node.yaml").read_text())
    content["http_options"] |= {"host": "127.0.0.1", "port": port}
    (folder / "keys.txt").write_text(f"alice sha256:{digest(KEY)}\n")
    arguments = content["applications"][0]["args"]
    for name in ("chat", "captioner"):
        del arguments[name]
    arguments |= {"preset": "toy", "engine": "fake", "api_keys": str(folder / "keys.txt")}
    arguments |= {"host": "127.0.0.1", "port": port, "cpus_per_replica": 0.1, **changes}
    path = folder / "deploy.yaml"
    path.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [python, "-m", "ray.serve.scripts", "deploy", "--address", cluster.jobs, path],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        | {"RAY_AUTH_MODE": "disabled"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _wait(cluster: Head, address: str, slots: int, seconds: float = 120) -> None:
    """Waits until every replica that reports has so many slots, and there are two of each model."""
    end = time.monotonic() + seconds
    page = ""
    while time.monotonic() < end:
        try:
            page = httpx.get(f"{address}/metrics", timeout=5).text
        except httpx.HTTPError:
            page = ""
        found = [line for line in page.splitlines() if line.startswith("sharegpt4v_engine_slots{")]
        if len(found) == 4 and all(line.endswith(f" {slots}.0") for line in found):
            return
        time.sleep(0.5)
    states = httpx.get(f"{cluster.jobs}/api/serve/applications/", timeout=30).text
    raise AssertionError(f"no four replicas of {slots} slots: {states[-3000:]}")


def test_a_file_is_deployed_and_another_version_of_it_loses_no_answer(
    cluster: Head, python: Path, tmp_path: Path
) -> None:
    """Eight clients stream all the time while replicas of four slots are replaced by such of six."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    slow = {"replicas": "2", "fake": {"seconds_per_request": 1.0}}
    _deploy(cluster, python, tmp_path, port, slots=4, **slow)
    _wait(cluster, address, 4)
    assert httpx.get(f"{address}/v1/models", timeout=20).status_code == 401
    outcomes: list[str] = []
    stop = threading.Event()

    def ask_on() -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            while not stop.is_set():
                try:
                    chunks = list(client.chat.completions.create(**BODY, stream=True))
                    outcomes.append(chunks[-1].choices[0].finish_reason or "cut")
                except (openai.APIError, httpx.HTTPError) as error:
                    outcomes.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(2)
        _deploy(cluster, python, tmp_path, port, slots=6, **slow)
        _wait(cluster, address, 6)
        time.sleep(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    assert len(outcomes) > 30
    assert set(outcomes) == {"stop"}, [outcome for outcome in outcomes if outcome != "stop"]
