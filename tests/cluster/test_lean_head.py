"""A cluster for one command on this machine has no processes that nobody asks."""

import subprocess
import sys

from tests.commands import environment

CODE = """
import os, sys, time
import ray
from cluster.session import ray_session
from tests.cluster.processes import descendants

before = {name: getattr(ray._private.node.Node, name) for name in ("start_api_server", "start_monitor")}
with ray_session("local"):
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    time.sleep(1)
    print(*descendants(os.getpid()).values(), sep="\\n")
assert before == {name: getattr(ray._private.node.Node, name) for name in before}
"""


def test_a_local_cluster_starts_what_a_run_needs_and_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "raylet" in done.stdout and "gcs_server" in done.stdout
    for part in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py"):
        assert part not in done.stdout
