"""The HTTP side: health, metrics, and the provider's delivery reports."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import orjson
import structlog
from aiohttp import web

from dispatcher.metrics import CONTENT_TYPE, Metrics
from dispatcher.settings import Settings

BACKLOG: Final = 4096
"""Connections that may wait to be taken."""

IDLE: Final = 15.0
"""Seconds for the headers of a request to come, and between two requests of a connection."""

log = structlog.get_logger()


class PortTaken(Exception):  # noqa: N818 - it says what is the matter
    """The server cannot listen; the text is one sentence that names the setting."""


class Server:
    """Listens while its context is open, and says in `port` where."""

    def __init__(
        self,
        settings: Settings,
        *,
        dsn: str,
        metrics: Metrics,
        unready: Callable[[], str | None],
    ) -> None:
        self.port = settings.http_port
        self._host = settings.http_host
        self._metrics = metrics
        self._unready = unready
        self._dsn = dsn
        self._closing = asyncio.Event()
        self._runner: web.ServerRunner | None = None

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(
            web.Server(self._answer, access_log=None, keepalive_timeout=IDLE),
            shutdown_timeout=5,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise PortTaken(_cannot_listen(self._host, self.port, error)) from None
        self.port = site.port
        log.info("http.listening", host=self._host, port=self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def run(self) -> None:
        """Write and apply reports until `close` is called."""
        await self._closing.wait()

    def accepted(self) -> None:
        """Say that identifiers were recorded: reports that wait may now find their message."""

    async def close(self) -> None:
        """Take no more requests, finish those under way, and end `run`."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._closing.set()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path == "/healthz":
            return _json({"status": "ok"})
        if path == "/readyz":
            reason = self._unready()
            if reason is None:
                return _json({"status": "ready"})
            return _json({"status": "not ready", "reason": reason}, status=503)
        if path == "/metrics":
            return web.Response(
                body=self._metrics.render(None), headers={"Content-Type": CONTENT_TYPE}
            )
        return web.Response(status=404, text="404: Not Found\n")


def _json(value: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        body=orjson.dumps(value), status=status, headers={"Content-Type": "application/json"}
    )


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"DISPATCHER_HTTP_PORT is wrong: port {port} on {host} is taken; "
            "stop what uses it or set another port."
        )
    return (
        f"DISPATCHER_HTTP_HOST or DISPATCHER_HTTP_PORT is wrong: cannot listen on {host} "
        f"port {port}; set an address of this machine and a port that it may open."
    )
