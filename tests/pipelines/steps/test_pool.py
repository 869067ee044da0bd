"""How many captioners run, and which pools are refused before anybody waits for them."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.steps.pool import CALLS_PER_ACTOR, actor_pool, decode_tasks, pool_size
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import UserError


def _config(**fields: Any) -> CaptionConfig:
    return CaptionConfig(images="photos", out=Path("run"), **fields)


@pytest.mark.parametrize(
    ("fields", "gpus", "expected"),
    [
        ({}, 0, (2, 2)),
        ({"gpus_per_actor": 1}, 8, (8, 8)),
        ({"gpus_per_actor": 0.5}, 2, (4, 4)),
        ({"actors": "3"}, 0, (3, 3)),
        ({"actors": "1:4"}, 0, (1, 4)),
        # A cluster that scales from nothing has no GPU yet.
        ({"gpus_per_actor": 1, "address": "head:6379"}, 0, (1, 1)),
    ],
)
def test_the_size_of_the_pool(fields: dict[str, Any], gpus: float, expected: tuple[int, int]) -> None:
    pool = actor_pool(_config(**fields), 1000, gpus, cpus=16)
    assert (pool.min_size, pool.max_size) == expected
    assert (
        pool.max_tasks_in_flight_per_actor is None and pool.max_concurrent_calls_per_actor == CALLS_PER_ACTOR
    )


def test_few_images_of_a_fast_engine_do_not_wait_for_a_second_actor() -> None:
    toy, fake = _config(), _config(model="somewhere/7b", engine="fake")
    assert [pool_size(toy, images, gpus=0) for images in (256, 257)] == [(1, 1), (2, 2)]
    assert pool_size(fake, 256, gpus=0) == (1, 1)
    # A slow one takes longer for them than a second one for its start.
    assert pool_size(_config(model="somewhere/7b"), 256, gpus=0) == (2, 2)
    assert pool_size(_config(gpus_per_actor=1), 256, gpus=8) == (8, 8)


def test_few_images_do_not_start_many_decoders() -> None:
    assert [decode_tasks(images, remote=False).size for images in (1, 200, 257, 1_025)] == [1, 1, 2, None]
    assert decode_tasks(200, remote=True).size is None  # they wait most of the time, so many should


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(gpus_per_actor=1, actors="2")
    with pytest.raises(UserError, match="2 actors of 1 GPUs need 2, this machine has 1: set --gpus"):
        actor_pool(config, 1000, gpus=1, cpus=16)
    assert actor_pool(config, 1000, gpus=2, cpus=16).min_size == 2
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # a job's cluster may grow
    assert actor_pool(config, 1000, gpus=1, cpus=16).min_size == 2


def test_actors_that_leave_no_cpu_to_decode_with() -> None:
    config = _config(actors="2:9", cpus_per_actor=2)
    with pytest.raises(UserError, match="2 actors of 2 CPUs leave none of 4 to decode with: lower --actors"):
        actor_pool(config, 1000, gpus=0, cpus=4)
    assert actor_pool(config, 1000, gpus=0, cpus=5).max_size == 9
