"""The pool of captioners: how many actors, and whether this machine can hold them."""

import math

import ray.data

from cluster.session import inside_job
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import UserError

CALLS_PER_ACTOR = 4
"""Batches an actor holds at once: while one waits for its last captions the others fill the engine."""


SMALL_TOY_RUN = 256
"""Images that the toy captioner is through with before a second actor, which costs five seconds of CPU time,
has loaded its model. How fast another model is on CPUs is not known beforehand."""


def pool_size(config: CaptionConfig, images: int, gpus: float) -> tuple[int, int]:
    """Returns the smallest and the largest number of actors.

    images: how many are to be captioned. gpus: what all nodes have together now.
    """
    if config.actors == "auto":
        if config.gpus_per_actor:
            size = max(1, int(gpus / config.gpus_per_actor))
        else:
            toy = config.model == "toy" or config.engine == "fake"
            size = 1 if toy and images <= SMALL_TOY_RUN else 2
        return size, size
    smallest, _, largest = config.actors.partition(":")
    return int(smallest), int(largest or smallest)


IMAGES_PER_DECODER = 256
"""A decoder costs 1.4 s of CPU time to start, in which a running one decodes about as many photographs."""


def decode_tasks(images: int, remote: bool) -> ray.data.TaskPoolStrategy:
    """Limits how many tasks decode at once: as many as Ray chooses, but few for a small run.

    images: how many are to be decoded. remote: they come over a network, and most of the time is waiting.
    """
    tasks = math.ceil(images / IMAGES_PER_DECODER)
    return ray.data.TaskPoolStrategy(None if remote or tasks > 4 else tasks)


def describe_size(size: tuple[int, int]) -> str:
    """Formats a size for people: `2 workers`, `1 to 8 workers`."""
    smallest, largest = size
    number = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    return f"{number} worker{'' if largest == 1 else 's'}"


def actor_pool(config: CaptionConfig, images: int, gpus: float, cpus: float) -> ray.data.ActorPoolStrategy:
    """Returns a pool of fixed size, or an elastic one for `--actors MIN:MAX`.

    images: how many are to be captioned. gpus, cpus: what all nodes have together now. Raises UserError for
    more than this machine has; a cluster may still grow.
    """
    smallest, largest = pool_size(config, images, gpus)
    if config.address is None and not inside_job():
        refuse_impossible(config, smallest, gpus, cpus)
    return ray.data.ActorPoolStrategy(
        min_size=smallest,
        max_size=largest,
        max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
        enable_true_multi_threading=True,
    )


def refuse_impossible(config: CaptionConfig, actors: int, gpus: float, cpus: float) -> None:
    """Raises UserError for actors that this machine cannot hold: they would be waited for in silence."""
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
