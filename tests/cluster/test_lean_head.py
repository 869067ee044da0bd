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


DATA_CODE = """
import os
import ray
from cluster.session import ray_session
from ray.data._internal.execution import streaming_executor
from tests.cluster.processes import descendants

class Double:
    def __call__(self, batch):
        return {"id": batch["id"] * 2}

before = streaming_executor.create_cluster_autoscaler
with ray_session("local"):
    rows = ray.data.range(100, override_num_blocks=10).map_batches(Double, concurrency=(1, 2), num_cpus=0.5)
    for row in rows.take_all():
        print("row", row["id"])
    print(*descendants(os.getpid()).values(), sep="\\n")
assert streaming_executor.create_cluster_autoscaler is before
"""


def test_a_data_set_on_this_machine_has_no_actors_that_serve_a_cluster() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DATA_CODE], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = sorted(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("row"))
    assert rows == list(range(0, 200, 2))
    assert "ray::MapWorker" in done.stdout
    for actor in ("_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"):
        assert actor not in done.stdout
