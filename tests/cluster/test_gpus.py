"""Actors that ask for GPUs, on a cluster that says it has some; the engine that runs there needs none."""

from pathlib import Path

import pytest

from tests.cluster.nodes import nodes
from tests.commands import sharegpt4v
from tests.undisturbed import arguments, assert_same_outcome

pytestmark = pytest.mark.workers


def test_an_elastic_pool_of_gpu_actors_captions_the_same(
    images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with nodes(4, head_gpus=2) as cluster:
        words = arguments(images, run, seconds=0.0)
        words += ["--actors", "1:2", "--gpus-per-actor", "1", "--dtype", "float32"]
        done = sharegpt4v(*words, "--address", cluster.address)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(run, undisturbed)
