"""Runs models on a cluster: plain classes that Ray Serve makes deployments of.

The replicas of the chat model answer HTTP themselves, so that their tokens cross one process less; they call
those of the other model. All report to the board every second, for metrics, limits and draining.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.affinity import Dialogues, News
from serve.api import Api
from serve.board import Report
from serve.dialogues import Call, ModelInfo
from serve.errors import ApiError, internal, overloaded, unavailable
from serve.logs import log_json
from serve.metrics import Families
from serve.model import Backend, Event, ServedModel, Snapshot
from serve.settings import Settings
from serve.shared_limits import SharedAdmission
from sharegpt4v.dialogue import Completion
from sharegpt4v.engine.build import EngineSpec, build_engine

log = logging.getLogger("serve.replica")

REPORT_SECONDS = 1.0

_LOST = (ray.exceptions.RayActorError, DeploymentUnavailableError)


class ModelReplica:
    """Loads a model and answers calls. Serve replaces it when its engine hangs or its process ends."""

    def __init__(self, info: ModelInfo, spec: EngineSpec, settings: Settings, board: Any) -> None:
        log_json()
        self.name: str = serve.get_replica_context().replica_id.unique_id
        self.board = board
        self.model = ServedModel(build_engine(spec), info, settings.hang_seconds, self.name)
        self._reports: asyncio.Task[None] | None = None

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yields the events of a call; cancelled when its client has left."""
        async with aclosing(self.model.answer(call)) as events:
            async for event in events:
                yield event

    async def ready(self) -> bool:
        return await self.model.ready()

    async def check_health(self) -> None:
        """Raises when the engine hangs, so that Serve starts another replica. Called every few seconds."""
        if self._reports is None:  # the constructor runs outside the loop
            self._reports = asyncio.ensure_future(self._report())
        if self.model.hung():
            raise RuntimeError("the engine made no token for too long")

    def report(self) -> Report:
        return Report(self.model.snapshot())

    def hear(self, news: News) -> None:
        """Takes what the board answers to a report."""

    async def _report(self) -> None:
        while True:
            with suppress(Exception):  # the board may be starting; the next second tries again
                self.hear(await self.board.report.remote(self.report()))
            await asyncio.sleep(REPORT_SECONDS)

    def __del__(self) -> None:
        if model := getattr(self, "model", None):
            model.engine.close()


class FrontReplica(ModelReplica):
    """A replica that answers HTTP as well. others: the handles of the other models, each with what it is."""

    def __init__(
        self,
        info: ModelInfo,
        spec: EngineSpec,
        settings: Settings,
        board: Any,
        others: "list[tuple[ModelInfo, Any]]",
    ) -> None:
        super().__init__(info, spec, settings, board)
        self._reachable = False
        remote = [RemoteModel(other, handle, board) for other, handle in others]
        self.dialogues = Dialogues(self.name)
        own = OwnReplicas(self.model, board, self.dialogues)
        models: list[Backend] = sorted([own, *remote], key=lambda one: one.info.kind)
        self.api = Api(
            {one.info.id: one for one in models},
            settings.limits,
            settings.keys,
            settings.captions,
            SharedAdmission(settings.limits, board, self.name),
            self._api_metrics,
            settings.log_texts,
        )

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yields the events of a call that another replica has forwarded."""
        self.dialogues.note(call.request)
        async with aclosing(super().answer(call)) as events:
            async for event in events:
                yield event

    async def check_health(self) -> None:
        """Raises when the engine hangs; the first time, tells Serve by which id this replica is reached."""
        if not self._reachable:
            self._reachable = True
            await self.reached_by(self.name)
        await super().check_health()

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def reached_by(self, name: str) -> str:
        """Makes calls with the model id `name` come here: Serve's only way to address one replica."""
        return name

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        return self.api.app()

    def report(self) -> Report:
        return replace(self._state(), dialogues=self.dialogues.take_fresh())

    def _state(self) -> Report:
        families = list(self.api.metrics.registry.collect())
        return Report(self.model.snapshot(), self.api.admission.in_flight, families)

    def hear(self, news: News) -> None:
        """Takes what the board answers to a report."""
        self.api.admission.draining = news.draining
        self.dialogues.hear(news)

    async def _api_metrics(self) -> dict[str, Families]:
        """Returns the metrics of every replica's API; this one's are of now."""
        own = self._state()
        return {self.name: own.api} | {
            one.snapshot.replica: one.api
            for one in await reports(self.board)
            if one.api and one.snapshot.replica != self.name
        }


class OwnReplicas:
    """The model in this process as a Backend, and its other replicas for dialogues that they have begun."""

    def __init__(self, model: ServedModel, board: Any, dialogues: Dialogues) -> None:
        self.info, self._model, self._board = model.info, model, board
        self._dialogues = dialogues
        self._others: Any = None

    def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yields the events of a call, from the replica that has its earlier rounds."""
        if replica := self._dialogues.better_replica(call.request):
            if self._others is None:  # in the constructor this deployment is not there yet
                context = serve.get_replica_context()
                self._others = serve.get_deployment_handle(context.deployment, context.app_name)
            handle = self._others.options(multiplexed_model_id=replica)
            return RemoteModel(self.info, handle, self._board).answer(call)
        self._dialogues.note(call.request)
        return self._model.answer(call)

    async def ready(self) -> bool:
        return await self._model.ready()

    async def snapshots(self) -> list[Snapshot]:
        """Returns this replica's state of now, and what the others reported last."""
        own = self._model.snapshot()
        others = await _snapshots(self._board, self.info.id)
        return [own, *(one for one in others if one.replica != own.replica)]


class RemoteModel:
    """A model's replicas as a Backend.

    Serve's own router chooses among them: its ConsistentHashRouter never answers the second of two calls
    that are made for one request (ray 2.60), as for a batch of images.
    """

    def __init__(self, info: ModelInfo, replicas: Any, board: Any) -> None:
        self.info = info
        self._replicas, self._board = replicas, board
        self._streaming = replicas.options(stream=True)

    async def answer(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yields events; never raises for a request's own fault. Closing it frees the slot."""
        events = self._streaming.answer.remote(call)
        ended = False
        try:
            async for event in events:
                ended = isinstance(event, Completion | ApiError)
                yield event
            ended = True
        except (BackPressureError, *_LOST, ray.exceptions.RayError) as error:
            ended = True
            log.error("a call failed", exc_info=error, extra={"request_id": call.request.id})
            busy, lost = isinstance(error, BackPressureError), isinstance(error, _LOST)
            yield overloaded() if busy else unavailable() if lost else internal()
        finally:
            if not ended:
                events.cancel()

    async def ready(self) -> bool:
        """Returns whether a replica answers within a second."""
        return bool(await _within_a_second(self._replicas.ready.remote(), False))

    async def snapshots(self) -> list[Snapshot]:
        """Returns what this model's replicas reported last."""
        return await _snapshots(self._board, self.info.id)


async def reports(board: Any) -> list[Report]:
    """Returns the last report of every replica, none while the board is being started again."""
    found: list[Report] = await _within_a_second(board.reports.remote(), [])
    return found


async def _snapshots(board: Any, model: str) -> list[Snapshot]:
    return [one.snapshot for one in await reports(board) if one.snapshot.model == model]


async def _within_a_second(response: Any, otherwise: Any) -> Any:
    async def result() -> Any:
        return await response

    try:
        return await asyncio.wait_for(result(), 1.0)
    except (TimeoutError, BackPressureError, *_LOST, ray.exceptions.RayError):
        return otherwise
