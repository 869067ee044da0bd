"""The server on Ray Serve: one deployment a model, replicas scaled each on its own.

`serve run serve.on_ray:build preset=toy` and the files in cluster/serve/ take the fields of ServeConfig.
The chat model's replicas answer HTTP themselves: benchmarks/README.md has the topologies that were measured.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.deployment import Application, Deployment

from cluster.session import cluster_address, inside_job, ray_session
from serve.board import Board, Report
from serve.one_process import DRAINING, KEEP_ALIVE_SECONDS, listen, url_of
from serve.replica import FrontReplica, ModelReplica
from serve.settings import Settings, make_settings
from sharegpt4v.config.base import resolve
from sharegpt4v.config.serve import ServeConfig
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.errors import RunFailed, UserError

APP = "sharegpt4v"

_FAST_PROXY = "RAY_SERVE_PROXY_USE_GRPC"
"""Has the proxy get answers by gRPC, not through objects of Ray, one a chunk: see benchmarks/README.md.

Replicas listen for it in any case. Clusters read it where they are started.
"""

_REFUSALS = 1_000
"""Requests beside those admitted that may be at a replica, which refuses them at once.

Serve's own queue took more than a second to say so under load.
"""


def build(args: dict[str, Any]) -> Application:
    """Builds the application for `serve run` and `serve deploy`; args: as in a file for --config."""
    given = dict(args)
    preset = given.pop("preset", next(iter(ServeConfig.presets)))
    if preset not in ServeConfig.presets:
        raise UserError(f"{preset!r} is unknown; known: {', '.join(ServeConfig.presets)}", field="preset")
    config = resolve(ServeConfig, ServeConfig.presets[preset].values, given)
    return application(config, make_settings(config))


def application(config: ServeConfig, settings: Settings) -> Application:
    """Binds the deployments: the board, a deployment a model, the last of them with the API."""
    board = serve.deployment(name="board", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)(
        Board
    ).bind(settings.limits)
    # The chat model comes last: streams are its work, and need the shorter way.
    *others, (info, spec) = settings.models
    bound = [
        (
            other,
            _deployment(config, spec_of, settings, ModelReplica, other.kind).bind(
                other, spec_of, settings, board
            ),
        )
        for other, spec_of in others
    ]
    front = serve.ingress()(FrontReplica)
    return _deployment(config, spec, settings, front, info.kind).bind(info, spec, settings, board, bound)


def _deployment(
    config: ServeConfig, spec: EngineSpec, settings: Settings, replica: type[ModelReplica], name: str
) -> Deployment:
    least, most = (int(config.replicas.split(":")[place]) for place in (0, -1))
    scaling: dict[str, Any] = {"num_replicas": least}
    if least != most:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                initial_replicas=least,
                target_ongoing_requests=spec.capacity,
            )
        }
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=settings.limits.in_flight + _REFUSALS,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.drain_seconds,
        **scaling,
    )(replica)


def serve_on_ray(config: ServeConfig, settings: Settings) -> int:
    """Serves until SIGTERM or Ctrl-C, and finishes the answers in progress."""
    _refuse_port_in_use(config)
    os.environ.setdefault(_FAST_PROXY, "1")  # read by the processes of a cluster that is started here
    with ray_session(config.address):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        options = HTTPOptions(host=config.host, port=config.port, keep_alive_timeout_s=KEEP_ALIVE_SECONDS)
        serve.start(http_options=options, proxy_location="HeadOnly")
        try:
            _serve_until_stopped(config, settings)
        except BaseException:  # a start that failed or was interrupted leaves nothing on a cluster
            _take_down()
            raise
    return 0


def _serve_until_stopped(config: ServeConfig, settings: Settings) -> None:
    try:
        serve.run(application(config, settings), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise RunFailed(f"the models did not start: {' '.join(str(error).split())[:300]}") from error
    names = ", ".join(info.id for info, _ in settings.models)
    url = url_of(config.host, config.port)
    place = "" if _proxy_is_here() else ", on the cluster's head"
    if not place:  # elsewhere the port may be open to the head alone
        _wait_ready(f"{url}/readyz")
    with _asked_to_stop() as asked:
        print(f"ready: {url}/v1 (models: {names}{place})", flush=True)
        while not asked.wait(0.5):  # without a timeout no signal would be seen
            pass
        print(DRAINING, file=sys.stderr, flush=True)
        drain(config.drain_seconds)
        _take_down()


def _proxy_is_here() -> bool:
    """Returns whether the proxy, which is on the head alone, is on this machine."""
    return ray.get_runtime_context().get_node_id() in serve.status().proxies


def _take_down() -> None:
    """Ends our application, also one that never became ready, and Serve where the cluster has no other."""
    applications = serve.status().applications
    if APP in applications:
        serve.delete(APP)
    if set(applications) <= {APP}:
        serve.shutdown()  # type: ignore[no-untyped-call]


def drain(seconds: float) -> bool:
    """Has all replicas refuse requests and waits for those in progress; returns whether all have ended."""
    board = serve.get_deployment_handle("board", APP)
    board.drain.remote().result(timeout_s=5)
    end = time.monotonic() + seconds
    time.sleep(min(seconds, 2.0))  # replicas learn of it with their next report, and say then what they have
    while time.monotonic() < end:
        found: list[Report] = board.reports.remote().result(timeout_s=5)
        if not any(one.in_flight for one in found):
            return True
        time.sleep(0.2)
    return False


def _refuse_port_in_use(config: ServeConfig) -> None:
    """Raises UserError before Ray and the weights cost a minute. A port of 0 would be Ray's default."""
    if config.port == 0:
        raise UserError("Ray's proxy needs a port of its own: give one, or `without_ray`", field="port")
    if cluster_address(config.address) is None and not inside_job():
        listen(config.host, config.port).close()


def _wait_ready(url: str, seconds: float = 60.0) -> None:
    """Waits until requests would be answered. Raises RunFailed when that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):  # no answer yet
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise RunFailed(
        f"{url} did not answer within {seconds:g} s; the replicas' logs are in Ray's session folder"
    )


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or Ctrl-C sets; the second one ends the process."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
