"""Several nodes, and what dies while they work: an actor, a decode task's process, a whole node."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipelines.steps.captioning import CaptionAndCommit
from tests.cluster.nodes import nodes
from tests.cluster.processes import descendants, kill_one
from tests.commands import committed, start, wait_for_commits
from tests.undisturbed import arguments, assert_same_outcome

pytestmark = pytest.mark.faults

ACTOR = f"MapBatches({CaptionAndCommit.__name__})"
DECODER = "MapBatches(Decode.__call__)"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that lends no CPU, as on real clusters, and two nodes that do the work."""
    with nodes(0, 4, 4) as started:
        yield started


def test_a_run_survives_the_deaths_of_an_actor_a_decoder_and_a_node(
    cluster: Cluster, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(*arguments(images, run, seconds=0.2), "--address", cluster.address)
    try:
        kill_one(os.getpid(), DECODER, seconds=45)  # decoding is done before the first commit
        wait_for_commits(process, run, 2)
        kill_one(os.getpid(), ACTOR)
        wait_for_commits(process, run, committed(run) + 2)
        # Hard: its raylet, and with it all workers, by SIGKILL. The node that works most has an actor.
        cluster.remove_node(_node_with(cluster, ACTOR), allow_graceful=False)
        assert process.poll() is None and committed(run) < 70, "the kills came too late to mean anything"
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert_same_outcome(run, undisturbed)


def _node_with(cluster: Cluster, title: str) -> Any:
    for node in cluster.worker_nodes:
        raylet = node.all_processes["raylet"][0].process.pid
        if any(title in line for line in descendants(raylet).values()):
            return node
    raise AssertionError(f"no node runs {title}")
