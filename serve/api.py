"""The HTTP API over any models: routes and errors; the same under uvicorn and on Ray Serve."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.answers import ChatChunks, model_object
from serve.captions import CaptionRules, caption_all, read_request
from serve.chat import admitted, chat_body, note_completion, prepare_call, sse, whole_answer
from serve.errors import ApiError, as_api_error, internal, unavailable
from serve.gatekeeping import Gatekeeping, api_response
from serve.limits import Admission, Limits
from serve.metrics import ApiMetrics, Families, metrics_page
from serve.model import Backend
from serve.openapi import CAPTION_EXAMPLE, CHAT_EXAMPLE, FORM, describe, error_responses, json_body
from serve.wire import CaptionRequest, ChatRequest, parse

T = TypeVar("T")


class Api:
    """The routes. models: by the names that clients give; keys: see serve/keys.py, none lets everybody in.

    of_replicas: returns the metrics of every replica's API, this one's own by default. logs_texts: whether
    the log has questions and answers.
    """

    def __init__(
        self,
        models: Mapping[str, Backend],
        limits: Limits | None = None,
        keys: Mapping[str, str] | None = None,
        captions: CaptionRules | None = None,
        admission: Admission | None = None,
        of_replicas: Callable[[], Awaitable[Mapping[str, Families]]] | None = None,
        logs_texts: bool = False,
    ) -> None:
        self.models = models
        self.limits = limits or Limits()
        self.keys = keys or {}
        self.captions = captions or CaptionRules()
        self.metrics = ApiMetrics()
        self.admission = admission or Admission(self.limits)
        self._of_replicas, self._logs_texts = of_replicas, logs_texts

    def app(self, at_end: Callable[[], Coroutine[Any, Any, None]] | None = None) -> FastAPI:
        """Makes the ASGI app. at_end: awaited when the server ends."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            if at_end is not None:
                await at_end()

        life: Callable[[FastAPI], AbstractAsyncContextManager[None]] = lifespan
        app = FastAPIOffline(  # scripts and styles of /docs come from here, not from a server elsewhere
            title="ShareGPT4V",
            version="1",
            summary="Captions and chats",
            lifespan=life,
            redoc_url=None,
            static_url="/docs/static",
        )
        chat, captions = json_body(ChatRequest, CHAT_EXAMPLE), json_body(CaptionRequest, CAPTION_EXAMPLE)
        security: list[dict[str, list[str]]] = [{"key": []}] if self.keys else []
        for path, route, content in (
            ("/v1/chat/completions", self.chat, chat),
            ("/v1/captions", self.caption, captions | FORM),
        ):
            extra = {"requestBody": {"required": True, "content": content}, "security": security}
            app.post(path, responses=error_responses(), openapi_extra=extra, response_model=None)(route)
        listed = {"responses": error_responses(401, 404), "openapi_extra": {"security": security}}
        app.get("/v1/models", response_model=None, **listed)(self.list_models)  # type: ignore[arg-type]
        app.get("/v1/models/{model}", response_model=None, **listed)(self.show_model)  # type: ignore[arg-type]
        app.get("/healthz", response_model=None)(self.healthz)
        app.get("/readyz", responses=error_responses(503), response_model=None)(self.readyz)
        app.get("/metrics", response_model=None)(self.show_metrics)
        app.add_exception_handler(ApiError, _answer_api_error)
        app.add_exception_handler(HTTPException, _answer_http_error)
        app.add_exception_handler(Exception, _answer_fault)
        app.add_middleware(
            Gatekeeping,
            admission=self.admission,
            keys=self.keys,
            metrics=self.metrics,
            names_requests=self._of_replicas is None,
            logs_texts=self._logs_texts,
        )
        describe(app)
        return app

    async def drain(self, seconds: float) -> bool:
        """Refuses further requests and waits for those in progress; returns whether all have ended."""
        self.admission.draining = True
        end = time.monotonic() + seconds
        while self.admission.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.admission.in_flight

    def backend(self, name: str) -> Backend:
        """Finds a model. Raises ApiError with the names there are."""
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404,
                f"no such model; there are: {', '.join(self.models)}",
                code="model_not_found",
                param="model",
            )
        return found

    async def chat(self, request: Request) -> Response:
        """Answers the next turn of a dialogue, whole or as server-sent events."""
        line = request.state.line
        body = parse(ChatRequest, await request.body())
        line.body_read = time.monotonic()
        backend = self.backend(body.model)
        line.more["model"] = body.model
        line.texts["messages"] = [{"role": one.role, "content": one.text} for one in body.messages]
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream", code="invalid_value", param="stream_options")
        call = await unless_gone(request, prepare_call(body, backend, self.limits, line.id))
        events = backend.answer(call)
        if not body.stream:
            completion, logprobs = await unless_gone(request, whole_answer(events))
            note_completion(line, completion)
            self.metrics.first_token.labels(body.model).observe(completion.first_token_seconds)
            return Response(
                chat_body(line.id, body.model, completion, logprobs), media_type="application/json"
            )
        await unless_gone(request, admitted(events))
        options = body.stream_options
        chunks = ChatChunks(line.id, body.model, bool(options and options.include_usage))
        stream = sse(events, chunks, line, self.metrics)
        # Proxies must neither keep nor join what is sent.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def caption(self, request: Request) -> Response:
        """Captions one image or a batch, with the gate's verdict and the tokens of each."""
        line = request.state.line
        body, pictures = await read_request(request, self.limits)
        line.body_read = time.monotonic()
        backend = self.backend(body.model) if body.model is not None else self._captioner()
        line.more |= {"model": backend.info.id, "images": len(pictures)}
        line.texts["prompt"] = body.prompt
        work = caption_all(body, pictures, backend, self.captions, self.limits, line.id)
        answer = await unless_gone(request, work)
        line.more |= answer["usage"]
        line.texts["captions"] = [row["caption"] for row in answer["data"]]
        for row in answer["data"]:
            verdict = row.get("verdict", {"accepted": False, "reason": "unusable_image"})
            self.metrics.verdicts.labels("accepted" if verdict["accepted"] else verdict["reason"]).inc()
        return Response(json.dumps(answer), media_type="application/json")

    def _captioner(self) -> Backend:
        found = [model for model in self.models.values() if model.info.kind == "captioner"]
        if not found:
            raise ApiError(
                404, "this server has no captioner: name a model", code="model_not_found", param="model"
            )
        return found[0]

    async def list_models(self) -> Response:
        """Lists the models."""
        rows = [model_object(model.info) for model in self.models.values()]
        return JSONResponse({"object": "list", "data": rows})

    async def show_model(self, model: str) -> Response:
        """Shows one model."""
        return JSONResponse(model_object(self.backend(model).info))

    async def healthz(self) -> Response:
        """Answers as long as the process works."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Answers 200 if requests would be answered: not before the models are there, nor while draining."""
        ready = [await model.ready() for model in self.models.values()]
        if self.admission.draining or not all(ready):
            return api_response(unavailable())
        return JSONResponse({"status": "ready"})

    async def show_metrics(self) -> Response:
        """Shows Prometheus metrics of the API and of every replica."""
        found = await asyncio.gather(*(model.snapshots() for model in self.models.values()))
        own = {"0": list(self.metrics.registry.collect())}
        families = await self._of_replicas() if self._of_replicas else own
        page = metrics_page([one for several in found for one in several], families)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits work that nobody needs once the client has left: it is cancelled then. The body must be read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client left", code="client_left")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.line.code = error.code
    return api_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Gives errors of the framework (no such path, a form that is none) OpenAI's shape."""
    assert isinstance(error, HTTPException)
    texts = {404: "no such path", 405: "this path takes another method"}
    message = texts.get(error.status_code, "the request cannot be read")
    return await _answer_api_error(request, ApiError(error.status_code, message, code="invalid_request"))


async def _answer_fault(request: Request, error: Exception) -> Response:
    answer = as_api_error(error, request.state.line.id)
    return await _answer_api_error(request, answer if answer.status < 500 else internal())
