"""`serve --address` on a cluster that has an application of Ray Serve already: it leaves that alone."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.heads import Head, bare_python, head
from tests.commands import environment, sharegpt4v
from tests.serve.server import user
from tests.serve.test_app import running
from tests.serve.test_on_ray import free_port

pytestmark = [pytest.mark.workers, pytest.mark.timeout(400)]

OTHER = """
import sys, ray
from ray import serve
ray.init(sys.argv[1], namespace="serve")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])}, proxy_location="HeadOnly")

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Other:
    async def __call__(self, request):
        return "the other one"

serve.run(Other.bind(), name="other", route_prefix="/other")
"""
BODY: dict[str, Any] = {"model": "fake-chat", "messages": [user("Hello?")]}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def cluster(python: Path) -> Iterator[Head]:
    with head(python, environment() | {"RAY_AUTH_MODE": "disabled"}, job_server=False) as started:
        yield started


@pytest.fixture(scope="module")
def port(cluster: Head, python: Path) -> int:
    """The port of the cluster's proxy, behind which the other application answers."""
    port = free_port()
    base = environment() | {"RAY_AUTH_MODE": "disabled"}
    words = [str(python), "-c", OTHER, cluster.address, str(port)]
    done = subprocess.run(words, capture_output=True, text=True, env=base, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _other(port) == "the other one"
    return port


def _other(port: int) -> str:
    return httpx.get(f"http://127.0.0.1:{port}/other", timeout=20).text


@pytest.fixture(autouse=True)
def _open_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def _arguments(cluster: Head, port: int) -> tuple[str, ...]:
    return ("serve", "--address", cluster.address, "--port", str(port), "--cpus-per-replica", "0.1")


def test_our_application_ends_and_the_other_one_goes_on(cluster: Head, port: int) -> None:
    with running(*_arguments(cluster, port), "--engine", "fake", wait=120) as (process, address):
        answer = httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=30)
        assert answer.json()["choices"][0]["message"]["content"]
        assert _other(port) == "the other one"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    _only_the_other(port)


def test_a_start_that_fails_leaves_nothing_behind(cluster: Head, port: int) -> None:
    models = ("--captioner", "none", "--slots", "65536")  # for which no memory is there
    done = sharegpt4v(*_arguments(cluster, port), *models)
    assert done.returncode == 1 and "the models did not start" in done.stderr, done.stderr
    _only_the_other(port)


def _only_the_other(port: int) -> None:
    assert _other(port) == "the other one"
    assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=20).status_code == 404
