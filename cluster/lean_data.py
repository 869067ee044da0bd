"""Runs Ray Data on this machine without three actors that serve a cluster.

One holds statistics for Ray's dashboard, which is not started; one asks for more nodes and shares them among
data sets; one knows on which node each actor is. A machine has one node and one command. Each actor is a
process of one or two seconds of CPU time, which a small run waits for. Ray Data has no settings for them, so
the functions that call them are replaced while the command runs; a Ray without these functions works as it
always does.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import ray
from ray.data import ExecutionResources
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler.base_cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.operators import actor_pool_map_operator

from cluster.replaced import replaced

_REPORTS = ("update_execution_metrics", "update_iteration_metrics", "register_dataset_to_stats_actor")


@contextmanager
def lean_data() -> Iterator[None]:
    """Leaves those actors out of the data sets that the block executes."""
    manager = getattr(stats, "_StatsManager", None)
    with ExitStack() as stack:
        for name in _REPORTS:
            stack.enter_context(replaced(manager, name, staticmethod(_nothing)))
        stack.enter_context(replaced(manager, "gen_dataset_id_from_stats_actor", staticmethod(_new_id)))
        stack.enter_context(replaced(streaming_executor, "create_cluster_autoscaler", _WholeMachine))
        stack.enter_context(
            replaced(actor_pool_map_operator, "get_or_create_actor_location_tracker", NoTracker)
        )
        stack.enter_context(replaced(actor_pool_map_operator, "get_actor_locations", _on_this_node))
        yield


class _WholeMachine(ClusterAutoscaler):
    """Gives a data set all that Ray has here. It never grows."""

    def __init__(self, *_: Any, **__: Any) -> None:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._total: ExecutionResources = ExecutionResources.from_resource_dict(resources)

    def try_trigger_scaling(self) -> None:
        """Asks for nothing."""

    def on_executor_shutdown(self) -> None:
        """Gives nothing back."""

    def get_total_resources(self) -> ExecutionResources:
        """Returns what the machine offers."""
        return self._total


class NoTracker:
    """Takes the place of the handle of the actor that each of a data set's actors reports its node to."""

    update_actor_location = property(lambda self: self)

    def remote(self, *_: Any) -> None:
        """Reports nothing."""


def _on_this_node(actors: Sequence[str]) -> dict[str, str]:
    return dict.fromkeys(actors, ray.get_runtime_context().get_node_id())


def _nothing(*_: Any, **__: Any) -> None:
    """Reports nothing."""


def _new_id() -> str:
    return uuid4().hex
