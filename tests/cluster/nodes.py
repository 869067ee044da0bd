"""Clusters of several raylets on this machine, as Ray's own tests start them."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ray.cluster_utils import Cluster


@contextmanager
def nodes(head_cpus: int, *other_cpus: int, head_gpus: int = 0) -> Iterator[Cluster]:
    """A head and as many nodes as numbers are given; connect to `.address`.

    head_gpus: as many does Ray believe to be there.
    """
    sessions = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: sockets' names may have 107 characters
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": head_cpus,
            "num_gpus": head_gpus,
            "include_dashboard": False,
            "temp_dir": sessions,
        },
    )
    try:
        for cpus in other_cpus:
            cluster.add_node(num_cpus=cpus)
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(sessions, ignore_errors=True)
