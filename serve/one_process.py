"""The server without Ray: API and models in this process, under uvicorn."""

import asyncio
import os
import resource
import signal
import socket
import sys
from types import FrameType

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve.api import Api
from serve.model import ServedModel
from serve.settings import Settings
from sharegpt4v.engine.build import build_engine
from sharegpt4v.errors import UserError

DRAINING = "draining: answers in progress are finished; a second signal ends at once"


KEEP_ALIVE_SECONDS = 75
"""How long a connection without a request is kept, here and on Ray: longer than a load balancer keeps it."""


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection whose first request has not come, or not to the end of its headers, in time.

    uvicorn itself waits for it without limit, and closes connections between two requests alone.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._silent = self.loop.call_later(KEEP_ALIVE_SECONDS, self._close_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silent.cancel()  # or it would hold this object, and its buffers, for so long
        super().connection_lost(exc)

    def _close_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _DrainingServer(uvicorn.Server):
    """Listens while it drains, so that probes and late clients are answered; a second signal ends it."""

    def __init__(self, config: uvicorn.Config, api: Api, drain_seconds: float) -> None:
        super().__init__(config)
        self._api, self._drain_seconds = api, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        url = url_of(*self.servers[0].sockets[0].getsockname()[:2])
        print(f"ready: {url}/v1 (models: {', '.join(self._api.models)})", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or self._api.admission.draining:
            os._exit(130 if sig == signal.SIGINT else 143)
        self._api.admission.draining = True
        print(DRAINING, file=sys.stderr, flush=True)
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await self._api.drain(self._drain_seconds)
            self.should_exit = True

        self._draining = asyncio.ensure_future(drain())


def serve_here(settings: Settings, host: str, port: int, drain_seconds: float) -> int:
    """Loads the models, serves until SIGTERM or Ctrl-C, and finishes the answers in progress."""
    listening = listen(host, port)
    models = [ServedModel(build_engine(spec), info, settings.hang_seconds) for info, spec in settings.models]
    try:
        api = Api(
            {model.info.id: model for model in models},
            settings.limits,
            settings.keys,
            settings.captions,
            logs_texts=settings.log_texts,
        )
        _raise_open_files()
        config = uvicorn.Config(
            api.app(),
            http=_Protocol,
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=2,
        )
        asyncio.run(_DrainingServer(config, api, drain_seconds).serve([listening]))
    finally:
        for model in models:
            model.engine.close()
    return 0


def url_of(host: str, port: int) -> str:
    """Returns the URL of a server that listens on an address, which may be IPv6."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_open_files() -> None:
    """Raises the limit of open files to the most this process may have: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """Takes the port before minutes are spent on weights. Raises UserError when it is not to be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}", field="port") from None
