"""The HTTP side: health, metrics, and the provider's delivery reports."""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import unquote_to_bytes

import orjson
import structlog
from aiohttp import http_exceptions, web

from dispatcher.db import gauges
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.db.refusal import Refused, refusals
from dispatcher.db.reports import Report
from dispatcher.domain.reports import Pairs, from_form, from_json, gathered, last, meaning
from dispatcher.intake import Intake, Stored
from dispatcher.metrics import CONTENT_TYPE, Metrics, Sample
from dispatcher.settings import Network, Settings

LIMIT: Final = 16 * 1024
"""Bytes of a query or of a body, at most."""

IDENTIFIER: Final = 200
"""Characters of an identifier, at most; the provider's own have 64."""

IDLE: Final = 15.0
"""Seconds for the head of a request to come, and between two requests of a connection."""

BODY: Final = 10.0
"""Seconds for the body of a request to come."""

LINGER: Final = 2.0
"""Seconds in which what is left of a refused body is read away, so that the refusal is heard."""

CONNECTIONS: Final = 4096
"""Connections at once, at most."""

FILES: Final = 65_536
"""Files that this process may open, where the system lets it."""

STATEMENT: Final = 5.0
"""Seconds that a statement may take before the database counts as away."""

SHUTDOWN: Final = 5.0
"""Seconds to finish requests in."""

FRESH: Final = 5.0
SHARE: Final = 20
STALE: Final = 60.0
"""A scrape asks the database anew after `FRESH` seconds, or after `SHARE` times as long as the
last asking took, up to `STALE` seconds."""

log = structlog.stdlib.get_logger()


class CannotListen(Exception):
    """The server cannot listen; the text is one sentence that names the setting."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a report is not taken."""

    status: int
    reason: str
    """For the log and the metrics."""
    closes: bool = False
    """Whether the connection ends with it."""


OFF: Final = Refusal(404, "endpoint off")
WRONG_TOKEN: Final = Refusal(404, "wrong token")
NOT_ALLOWED: Final = Refusal(403, "address not allowed")
WRONG_METHOD: Final = Refusal(405, "wrong method")
MISSING: Final = Refusal(400, "parameter missing")
UNREADABLE: Final = Refusal(400, "unreadable", closes=True)
TOO_LARGE: Final = Refusal(413, "too large", closes=True)
TOO_SLOW: Final = Refusal(408, "too slow", closes=True)
AWAY: Final = Refusal(503, "database away")
BUSY: Final = Refusal(503, "too many at once")

_REFUSED: Final = {Stored.YES: None, Stored.AWAY: AWAY, Stored.FULL: BUSY}


class Server:
    """Listens while its context is open, and says in `port` where.

    Entering it raises CannotListen. Reports are taken while `run` runs.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        dsn: str,
        metrics: Metrics,
        unready: Callable[[], str | None],
    ) -> None:
        """`unready` tells in one phrase why the worker is not ready, None if it is."""
        self.port = settings.http_port
        self._host = settings.http_host
        token = settings.dlr_token
        self._token = None if token is None else token.encode("utf-8", "surrogateescape")
        self._allowed = settings.dlr_allow
        self._id_param = settings.dlr_id_param
        self._status_param = settings.dlr_status_param
        self._words = settings.dlr_status_map
        self._metrics = metrics
        self._unready = unready
        self._intake = Intake(dsn, metrics)
        self._scrapes = _Scrapes(dsn)
        self._refusals = _Refusals(metrics)
        self._runner: web.ServerRunner | None = None

    async def __aenter__(self) -> Self:
        _make_room()
        runner = web.ServerRunner(
            _Listener(
                self._answer,
                unreadable=self._refusals.note,
                access_log=None,
                keepalive_timeout=IDLE,
                lingering_time=LINGER,
                # What is longer is cut off, and may miss the answer that it is too large.
                max_line_size=4 * LIMIT,
                auto_decompress=False,
            ),
            shutdown_timeout=SHUTDOWN,
        )
        await runner.setup()
        site = web.TCPSite(runner, self._host, self.port, backlog=CONNECTIONS)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise CannotListen(_cannot_listen(self._host, self.port, error)) from None
        self._runner = runner
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
        """Store reports and apply them, until cancelled or closed."""
        await self._intake.run()

    def accepted(self) -> None:
        """Say that identifiers were recorded: reports that wait may find their message now."""
        self._intake.look()

    async def close(self) -> None:
        """Take no more requests, finish those under way, and end `run`."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        async with asyncio.TaskGroup() as group:
            # `run` may have been cancelled; what it left is stored all the same.
            group.create_task(self._intake.store())
            await runner.cleanup()
            self._intake.close()
        await self._intake.release()
        await self._scrapes.release()
        self._refusals.flush()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if path.startswith("/dlr/"):
            return await self._report(request, path.removeprefix("/dlr/"))
        if path not in {"/healthz", "/readyz", "/metrics"}:
            return _response(404, b"Not found\n")
        if request.method not in {"GET", "HEAD"}:
            return _response(405, b"Method not allowed\n", {"Allow": "GET, HEAD"})
        if path == "/metrics":
            samples = await self._scrapes.samples()
            return _response(200, self._metrics.render(samples), {"Content-Type": CONTENT_TYPE})
        reason = self._unready() if path == "/readyz" else None
        if reason is None:
            return _json(200, {"status": "ok"})
        return _json(503, {"status": "unready", "reason": reason})

    async def _report(self, request: web.BaseRequest, token: str) -> web.Response:
        """Store one report, or say why not."""
        refusal = self._admit(request, token) or await self._take(request)
        if refusal is None:
            return _response(200, b"OK")
        self._refusals.note(refusal, request.remote)
        headers = {"Allow": "GET, POST"} if refusal is WRONG_METHOD else {}
        if refusal.status == 503:
            headers["Retry-After"] = "1"
        sentence = self._explain(refusal)
        response = _response(refusal.status, sentence.encode(), headers)
        if refusal.closes:
            response.force_close()
        return response

    def _admit(self, request: web.BaseRequest, token: str) -> Refusal | None:
        if self._token is None:
            return OFF
        given = unquote_to_bytes(token.encode("utf-8", "surrogateescape"))
        if not hmac.compare_digest(given, self._token):
            return WRONG_TOKEN
        if self._allowed and not _within(request.remote or "", self._allowed):
            return NOT_ALLOWED
        return None if request.method in {"GET", "POST"} else WRONG_METHOD

    async def _take(self, request: web.BaseRequest) -> Refusal | None:
        pairs = await _read(request)
        if isinstance(pairs, Refusal):
            return pairs
        params = gathered(pairs)
        identifier, word = last(params, self._id_param), last(params, self._status_param)
        if not (0 < len(identifier) <= IDENTIFIER and word):
            return MISSING
        report = Report(identifier, meaning(word, self._words), orjson.dumps(params).decode())
        return _REFUSED[await self._intake.put(report, word)]

    def _explain(self, refusal: Refusal) -> str:
        """What the other side is told, without the token."""
        if refusal is MISSING:
            return (
                f"The parameters {self._id_param} and {self._status_param} are needed, "
                f"{self._id_param} with at most {IDENTIFIER} characters.\n"
            )
        if refusal.status == 404:
            return "Not found\n"
        return f"{refusal.reason.capitalize()}\n"


class _Scrapes:
    """The gauges of the database, asked for as seldom as scrapes can bear."""

    def __init__(self, dsn: str) -> None:
        self._session = Session(dsn, name="dispatcher metrics", timeout=STATEMENT)
        self._turn = asyncio.Lock()
        self._samples: list[Sample] | None = None
        self._ask_at = 0.0

    async def samples(self) -> list[Sample] | None:
        """The gauges, None while the database is away."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            began = clock()
            if began < self._ask_at:
                return self._samples
            try:
                with refusals():
                    self._samples = await gauges.read(self._session)
                wait = min(STALE, max(FRESH, SHARE * (clock() - began)))
            except DatabaseLost:
                self._samples, wait = None, FRESH
            except Refused as error:
                log.error("metrics.failed", reason=str(error))
                self._samples, wait = None, FRESH
            self._ask_at = clock() + wait
            return self._samples

    async def release(self) -> None:
        """Close the connection."""
        await self._session.close()


class _Refusals:
    """Counts refusals and logs them: a line a second for each reason, so no flood fills a disk."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._held: dict[Refusal, tuple[int, str | None, asyncio.TimerHandle]] = {}

    def note(self, refusal: Refusal, address: str | None) -> None:
        """Take note of one refusal."""
        self._metrics.refused(refusal.reason)
        if refusal in self._held:
            count, _, timer = self._held[refusal]
            self._held[refusal] = count + 1, address, timer
        else:
            self._tell(refusal, 1, address)

    def flush(self) -> None:
        """Log what is held back."""
        for refusal, (count, address, timer) in self._held.items():
            timer.cancel()
            if count:
                self._log(refusal, count, address)
        self._held.clear()

    def _tell(self, refusal: Refusal, count: int, address: str | None) -> None:
        self._log(refusal, count, address)
        timer = asyncio.get_running_loop().call_later(1, self._second_over, refusal)
        self._held[refusal] = 0, None, timer

    def _second_over(self, refusal: Refusal) -> None:
        count, address, _ = self._held.pop(refusal)
        if count:
            self._tell(refusal, count, address)

    @staticmethod
    def _log(refusal: Refusal, count: int, address: str | None) -> None:
        log.warning(
            "report.refused",
            reason=refusal.reason,
            status=refusal.status,
            count=count,
            address=address,
        )


class _Listener(web.Server):
    """aiohttp's server, with our own connections and a bound on their number."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        *,
        unreadable: Callable[[Refusal, str | None], None],
        **settings: Any,
    ) -> None:
        super().__init__(handler)
        self._unreadable = unreadable
        self._settings = settings

    def __call__(self) -> web.RequestHandler:
        return _Connection(
            self, unreadable=self._unreadable, loop=asyncio.get_running_loop(), **self._settings
        )

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) > CONNECTIONS:
            # Not before aiohttp has begun with it.
            asyncio.get_running_loop().call_soon(transport.abort)


class _Connection(web.RequestHandler):
    """aiohttp's connection, whose own words could hold a token or a number: they are not logged."""

    __slots__ = ("_unreadable",)

    def __init__(
        self,
        manager: web.Server,
        *,
        unreadable: Callable[[Refusal, str | None], None],
        **settings: Any,
    ) -> None:
        super().__init__(manager, **settings)
        self._unreadable = unreadable

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002 - aiohttp's signature
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's signature
    ) -> web.StreamResponse:
        """Answer what is no HTTP, and what failed here."""
        if isinstance(exc, http_exceptions.HttpProcessingError):
            large = isinstance(exc, http_exceptions.LineTooLong)
            refusal = TOO_LARGE if large else UNREADABLE
            self._unreadable(refusal, request.remote)
            response = _response(refusal.status, f"{refusal.reason.capitalize()}\n".encode())
        else:
            log.error("http.failed", exc_info=exc)
            response = _response(500, b"Internal error\n")
        response.force_close()
        return response

    def log_exception(self, *_: Any, exc_info: BaseException | None = None) -> None:
        """Log what went wrong outside of any handler."""
        log.error("http.failed", exc_info=exc_info)


async def _read(request: web.BaseRequest) -> Pairs | Refusal:
    """All parameters of a report: from the query, and for POST from the body too."""
    query = request.rel_url.raw_query_string.encode("utf-8", "surrogateescape")
    if len(query) > LIMIT:
        return TOO_LARGE
    pairs = from_form(query)
    more: Pairs | None = []
    if request.method == "POST":
        body = await _body(request)
        if isinstance(body, Refusal):
            return body
        more = from_json(body) if request.content_type.endswith("json") else from_form(body)
    return UNREADABLE if pairs is None or more is None else pairs + more


async def _body(request: web.BaseRequest) -> bytes | Refusal:
    if (request.content_length or 0) > LIMIT:
        return TOO_LARGE
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun
    body = bytearray()
    try:
        async with asyncio.timeout(BODY):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > LIMIT:
                    return TOO_LARGE
    except TimeoutError:
        return TOO_SLOW
    except (web.RequestPayloadError, ConnectionError):
        return UNREADABLE
    return bytes(body)


@lru_cache(maxsize=1024)
def _within(address: str, networks: tuple[Network, ...]) -> bool:
    """Tell whether an address is in one of the networks, IPv4 also when mapped into IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return any(
        candidate in network for network in networks for candidate in (ip, mapped) if candidate
    )


def _response(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status,
        body=body,
        headers={"Content-Type": "text/plain; charset=utf-8", "Server": "dispatcher"}
        | dict(headers or {}),
    )


def _json(status: int, value: Mapping[str, str]) -> web.Response:
    return _response(status, orjson.dumps(value), {"Content-Type": "application/json"})


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"DISPATCHER_HTTP_PORT is wrong: port {port} on {host} is taken; "
            "stop what uses it or set another port."
        )
    return (
        f"DISPATCHER_HTTP_HOST or DISPATCHER_HTTP_PORT is wrong: cannot listen on {host} "
        f"port {port}; set an address of this machine and a port that this user may open."
    )


def _make_room() -> None:
    """Let this process open enough files: each connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
