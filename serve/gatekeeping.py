"""What happens around every request, in plain ASGI: its id, its key, admission, body limits, log and metrics.

Nothing of a body is read before the request is admitted: a server under load says so at once.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any

from starlette.responses import JSONResponse

from serve.errors import ApiError
from serve.keys import is_loopback, name_of
from serve.limits import Admission
from serve.metrics import ApiMetrics

log = logging.getLogger("serve.access")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})
"""Paths that need no key, as what is below /docs: a browser could not send it."""

ROUTES = PUBLIC | {"/v1/chat/completions", "/v1/captions", "/v1/models"}
"""Paths that metrics and logs name; another one may hold anything."""

_OWN_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


def api_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


class Gatekeeping:
    """Wraps the API. keys: names by hash; with none every request is let in, under the name `anyone`.

    names_requests: whether answers get the header x-request-id here; Ray Serve's proxy adds its own.
    logs_texts: whether the log has questions and answers, without their images.
    """

    def __init__(
        self,
        app: App,
        admission: Admission,
        keys: Mapping[str, str],
        metrics: ApiMetrics,
        names_requests: bool = True,
        logs_texts: bool = False,
    ) -> None:
        self.app, self.admission, self.keys, self.metrics = app, admission, keys, metrics
        self._names_requests, self._logs_texts = names_requests, logs_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        line = _Line(scope, headers)
        scope.setdefault("state", {})["line"] = line

        async def send_marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                line.status = message["status"]
                marks = [(b"x-content-type-options", b"nosniff")]
                if self._names_requests:
                    marks.append((b"x-request-id", line.id.encode()))
                message["headers"] = [*message.get("headers", []), *marks]
            await send(message)

        try:
            await self._guarded(scope, receive, send_marked, headers, line)
        finally:
            self._note(line)

    async def _guarded(
        self, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str], line: "_Line"
    ) -> None:
        limits = self.admission.limits
        try:
            line.key = self._key(scope, headers)
            works = scope["method"] == "POST" and scope["path"].startswith("/v1/")
            async with self.admission.admitted(line.key) if works else nullcontext():
                length = headers.get("content-length", "")
                if length.isdigit() and int(length) > limits.body_bytes:
                    raise _too_large(limits.body_bytes)
                self.metrics.in_flight.set(self.admission.in_flight)
                body = _LimitedBody(receive, limits.body_bytes, limits.body_seconds)
                await self.app(scope, body.receive, send)
        except ApiError as error:  # of this module alone: the app answers its own
            line.code = error.code
            await api_response(error)(scope, receive, send)
        finally:
            self.metrics.in_flight.set(self.admission.in_flight)

    def _key(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """Returns the name of the request's key. Raises ApiError for none or a wrong one."""
        if scope["path"] in PUBLIC or scope["path"].startswith("/docs/"):
            return "anyone"
        if not self.keys:
            here = scope.get(
                "server"
            )  # a file for `serve deploy` may open the port whatever we were started with
            if here and not is_loopback(here[0]):
                raise ApiError(403, "without API keys this machine alone is answered", code="keys_required")
            return "anyone"
        name = name_of(headers.get("authorization", ""), self.keys)
        if name is None:
            raise ApiError(401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key")
        return name

    def _note(self, line: "_Line") -> None:
        seconds = time.monotonic() - line.begun
        self.metrics.requests.labels(line.route, line.status).inc()
        self.metrics.seconds.labels(line.route).observe(seconds)
        if line.code:
            self.metrics.errors.labels(line.code).inc()
        if line.route in PUBLIC and line.status < 400:
            return  # probes, every few seconds
        texts = line.texts if self._logs_texts else {}
        log.info("request", extra={**line.fields(), **texts, "seconds": round(seconds, 4)})


class _Line:
    """What is known of a request for its line in the log, added to while it is answered.

    texts: what was asked and answered, for logs that are to have it.
    """

    def __init__(self, scope: Scope, headers: Mapping[str, str]) -> None:
        own = headers.get("x-request-id", "")
        self.id = own if _OWN_ID.fullmatch(own) else f"req-{uuid.uuid4().hex}"
        self.begun = time.monotonic()
        self.route = scope["path"] if scope["path"] in ROUTES else "other"
        self.method = scope["method"]
        self.status = 499  # the client left before any answer, unless one is sent
        self.key = ""
        self.code: str | None = None
        self.more: dict[str, Any] = {}
        self.texts: dict[str, Any] = {}

    def fields(self) -> dict[str, Any]:
        known = {"request_id": self.id, "method": self.method, "route": self.route, "status": self.status}
        return known | {"key": self.key} | ({"code": self.code} if self.code else {}) | self.more


class _LimitedBody:
    """Hands on a body's parts, within a number of bytes and of seconds."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most, self._seen = receive, most, 0
        self._end = time.monotonic() + seconds
        self._whole = False

    async def receive(self) -> MutableMapping[str, Any]:
        """Returns the next part. Raises ApiError for a part too many, or one that does not come."""
        if self._whole:
            return await self._receive()  # the client's leaving, for which there is no time limit
        try:
            async with asyncio.timeout(self._end - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._seen > self._most:
                raise _too_large(self._most)
        return message


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")
