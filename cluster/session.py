"""Connecting to Ray, and leaving it again however the work ends."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from cluster.access import refused_token, require_access, token_file
from cluster.env import runtime_env
from cluster.lean_data import lean_data
from cluster.lean_head import lean_head
from cluster.watchdog import Service, Watchdog, prompt_interrupts
from sharegpt4v.errors import UserError

_LOGICAL_CPUS = 4
"""Ray Data keeps decoders and actors going and reserves a share for each. Each slot is a process that costs
two seconds to start; a fifth brought nothing on 2 cores."""


_LOST_HERE = "what was committed is kept: run the same command again"
_LOST_THERE = "what was committed is kept: once the cluster is back, run the same command again"

_GCS_PATIENCE = 40.0
"""Seconds a cluster's head may be away: one with a stored state comes back, and Ray itself waits 60."""


def inside_job() -> bool:
    """Returns whether Ray's job server started this process, in a copy of the submitted working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def refuse_relative_paths(**paths: str | Path | None) -> None:
    """Raises UserError, naming the flag, for a relative path inside a job, where it would lead into the copy
    of the working directory that vanishes with the job. URIs are absolute."""
    for flag, path in paths.items():
        if path and inside_job() and "://" not in str(path) and not Path(path).is_absolute():
            raise UserError(
                f"--{flag} {path} is relative, and a job's working directory is a copy that is thrown away: "
                f"give an absolute path that every node sees"
            )


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connects to `address`, or to RAY_ADDRESS, as inside a job, or starts a cluster here.

    A cluster's nodes are sent our code, unless this is a job, which brought it. Raises UserError when the
    cluster cannot be reached, and RunFailed when it dies meanwhile.
    """
    there = cluster_address(address)
    local = there is None
    with _quiet_native_stderr():
        _connect(there, None if local or inside_job() else runtime_env())
        try:
            with lean_data() if local else nullcontext(), _guarded(local):
                yield
        finally:
            _leave()


@contextmanager
def _guarded(local: bool) -> Iterator[None]:
    """Ends the block at Ctrl-C or when Ray dies, in the main thread: no other can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with prompt_interrupts() as leave:
        try:
            with Watchdog(_services(local), leave):
                yield
        finally:
            _leave()  # here too, where a slow shutdown is cut short


def cluster_address(address: str | None) -> str | None:
    """Returns where ray_session(address) connects to; None where it starts a cluster on this machine."""
    there = address or os.environ.get("RAY_ADDRESS") or "local"
    return None if there == "local" else there


def connection_text(address: str | None) -> str:
    """Describes what ray_session(address) does first, for people."""
    there = cluster_address(address)
    return "starting Ray on this machine" if there is None else f"connecting to Ray at {there}"


def local_cpus() -> int:
    """CPUs that a cluster which is started here offers."""
    return max(_LOGICAL_CPUS, len(os.sched_getaffinity(0)))


def _connect(there: str | None, environment: dict[str, Any] | None) -> None:
    address, local = there or "local", there is None
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is a job server: give the cluster's own address, HOST:PORT, or submit a job there: "
            f'`ray job submit --address {address} --runtime-env-json "$(python -m cluster.env)" -- '
            f"python -m pipelines.caption ...`"
        )
    own: dict[str, Any] = {
        "num_cpus": local_cpus(),
        "include_dashboard": False,
    }
    # Ray's hint about a default of a coming release is of no use to our users.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not local and not inside_job():
        require_access(address)
    try:
        with lean_head() if local else nullcontext():
            ray.init(
                address=address,
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if local else {}),
            )
        _keep_token_private()
    except AuthenticationError:
        raise refused_token(address) from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"cannot reach Ray at {address}: {cause}") from None


def _leave() -> None:
    """Ends the connection, and a cluster that was started here; does nothing the second time."""
    node = ray._private.worker._global_node
    if node is not None:
        # The monitor of the autoscaler, where this is the head: at SIGTERM it would look for the rest of Ray,
        # which has ended before it, and be killed after a second.
        node.kill_monitor(check_alive=False)
    ray.shutdown()


def _keep_token_private() -> None:
    """Makes the token file readable by its owner only: Ray writes it readable for all on this machine."""
    token = token_file()
    if token.exists() and token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


def _services(local: bool) -> list[Service]:
    """Returns the two processes of Ray that a driver cannot do without: the head's and its own node's."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    own = context.get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    node = next(node for node in nodes if node["NodeID"] == own)
    advice, patience = (_LOST_HERE, 3.0) if local else (_LOST_THERE, _GCS_PATIENCE)
    return [
        Service("Ray's head", host.strip("[]"), int(port), patience, advice),
        Service("Ray's node", node["NodeManagerAddress"], node["NodeManagerPort"], 3.0, advice),
    ]


def cluster_resource(name: str) -> float:
    """Sums a resource, `GPU` for example, over all living nodes."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return float(sum(node["Resources"].get(name, 0) for node in nodes if node["Alive"]))


def quiet_data_context(no_progress_seconds: float) -> None:
    """Sets up Ray Data without its own bars (ours count images, not blocks), and with errors for hangs."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = no_progress_seconds


@contextmanager
def _quiet_native_stderr() -> Iterator[None]:
    """Keeps what Ray's C++ side writes to file descriptor 2 off the terminal; Python's stderr stays there.

    It warns, for one, about the constructor arguments of Ray Data's own actors. Nothing is lost: the same
    lines are in Ray's session logs.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    python_stderr, sys.stderr = sys.stderr, os.fdopen(terminal, "w", buffering=1, closefd=False)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = python_stderr
        os.dup2(terminal, 2)
        os.close(terminal)
