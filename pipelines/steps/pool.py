"""The pool of captioners: how many actors, and whether this machine can hold them."""

import ray.data

from cluster.session import inside_job
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import UserError

CALLS_PER_ACTOR = 4
"""Batches an actor holds at once: while one waits for its last captions the others fill the engine."""


def actor_pool(config: CaptionConfig, gpus: float, cpus: float) -> ray.data.ActorPoolStrategy:
    """Of fixed size, or elastic for `--actors MIN:MAX`. gpus, cpus: what all nodes have together now.

    Raises UserError for more than this machine has; a cluster may still grow.
    """
    shape: dict[str, int]
    if config.actors == "auto":
        shape = {"size": max(1, int(gpus / config.gpus_per_actor)) if config.gpus_per_actor else 2}
    elif ":" in config.actors:
        smallest, largest = map(int, config.actors.split(":"))
        shape = {"min_size": smallest, "max_size": largest}
    else:
        shape = {"size": int(config.actors)}
    if config.address is None and not inside_job():
        _refuse_impossible(config, shape.get("size") or shape["min_size"], gpus, cpus)
    return ray.data.ActorPoolStrategy(
        **shape, max_concurrent_calls_per_actor=CALLS_PER_ACTOR, enable_true_multi_threading=True
    )


def _refuse_impossible(config: CaptionConfig, actors: int, gpus: float, cpus: float) -> None:
    """Actors that no node can hold would be waited for in silence."""
    if actors * config.gpus_per_actor > gpus:
        raise UserError(
            f"{actors} actors of {config.gpus_per_actor:g} GPUs need {actors * config.gpus_per_actor:g}, "
            f"this machine has {gpus:g}: set --gpus-per-actor 0, or run on a cluster with --address"
        )
    if actors * config.cpus_per_actor > cpus - 1:
        raise UserError(
            f"{actors} actors of {config.cpus_per_actor:g} CPUs leave none of {cpus:g} to decode with: lower "
            f"--actors or --cpus-per-actor"
        )
