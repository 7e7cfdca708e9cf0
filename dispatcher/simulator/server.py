"""The provider on a real socket."""

import asyncio
import json
import random
import socket
import struct
import time
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, TypedDict, cast
from urllib.parse import parse_qs

from dispatcher.simulator.config import BanNow, Config, amend, mapping, merge
from dispatcher.simulator.faults import Fault, between, draw, one_of, spoiled
from dispatcher.simulator.http import HttpRequest, Malformed, decode, response, take
from dispatcher.simulator.received import Received, Summary
from dispatcher.simulator.reports import Report, Reporter, plan
from dispatcher.simulator.rules import Answer, Provider, Request

PATH = "/users/send_bulk.php"

_BACKLOG = 1024
_BUFFER_MAX = 256 * 1024
_LINGER_OFF = struct.pack("ii", 1, 0)


class ReportsSummary(TypedDict):
    """Delivery reports: see `Reporter.counts`; `waiting` are not sent yet."""

    planned: int
    sent: int
    failed: int
    given_up: int
    dropped: int
    waiting: int


class State(Summary):
    """What /simulator/received tells: all that was received, and how things stand.

    `banned` maps an address (`*` for all) to the seconds left of its ban.
    """

    seed: int
    bans: int
    banned: dict[str, float]
    reports: ReportsSummary


@dataclass(frozen=True, slots=True)
class Reaction:
    """What is done about one request: after `latency` seconds, either `content` or a `fault`."""

    latency: float
    content: bytes
    keep: bool
    fault: Fault | None = None
    reports: tuple[Report, ...] = ()


class Simulator:
    """The provider, started: `async with Simulator(config) as s:` serves at `s.url`.

    Raises OSError if it cannot listen at the address.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        seed = self.config.seed
        self.seed = random.getrandbits(32) if seed is None else seed
        self.address = ""
        self.reporter = Reporter(self.config.reports)
        self.connections: set[_Connection] = set()
        self._provider = Provider(self.config.services, self.config.ban)
        self._log = Received(self.config.log_size)
        self._server: asyncio.Server
        self._reporting: asyncio.Task[None]

    @property
    def url(self) -> str:
        """The whole address for a client's requests; `address` is its `http://HOST:PORT`."""
        return self.address + PATH

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self.config.host, self.config.port, backlog=_BACKLOG
        )
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._reporting = asyncio.create_task(self.reporter.run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for connection in list(self.connections):
            connection.abort()
        self._reporting.cancel()
        await asyncio.wait({self._reporting})
        await self._server.wait_closed()
        if not self._reporting.cancelled():
            self._reporting.result()

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Serve until the event is set, or until the sending of reports has failed."""
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, self._reporting}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    def received(self) -> State:
        """What was received so far, as /simulator/received tells it."""
        counts = self.reporter.counts
        return {
            **self._log.summary(),
            "seed": self.seed,
            "bans": self._provider.bans,
            "banned": self._provider.banned(time.monotonic()),
            "reports": {
                "planned": counts["planned"],
                "sent": counts["sent"],
                "failed": counts["failed"],
                "given_up": counts["given_up"],
                "dropped": counts["dropped"],
                "waiting": self.reporter.waiting,
            },
        }

    def messages(self, after: int = 0) -> list[dict[str, Any]]:
        """The log of the requests that followed number `after`, as /simulator/messages tells it."""
        return [json.loads(line) for line in self._log.lines(after)]

    def set(self, changes: object) -> None:
        """Change the set-up while it runs, as POST /simulator/set does.

        `changes` is shaped like the configuration: what it names is laid over the present one, a
        service over the one with its `id`. Besides, `ban_now` (seconds, or an object with
        `seconds` and `ip`) bans all addresses or one, and `unban` (true) lifts every ban.

        Raises ValueError with one sentence, and changes nothing, if they do not fit.
        """
        changes = dict(mapping(changes, "the set of changes"))
        for fixed in ("host", "port", "seed"):
            if fixed in changes:
                raise ValueError(f"{fixed} cannot be changed while the simulator runs.")
        ban, unban = changes.pop("ban_now", None), changes.pop("unban", False)
        order = amend(BanNow(), ban if isinstance(ban, dict) else {"seconds": ban or 0}, "ban_now")
        config = self.config = merge(self.config, changes)
        for service in config.services:
            self._provider.change(service)
        self._provider.ban = config.ban
        self.reporter.settings = config.reports
        if unban:
            self._provider.unban()
        if ban is not None:
            self._provider.ban_now(order.seconds, time.monotonic(), order.ip)

    def reset(self) -> None:
        """Forget all that was received, used, banned and is yet to be reported; keep the set-up."""
        self._log = Received(self.config.log_size)
        self._provider.reset()
        self.reporter.reset()

    def react(self, request: HttpRequest, ip: str) -> Reaction:
        """Decide one whole HTTP request from this address, which has arrived just now."""
        if request.path == PATH:
            if request.method != "GET":
                return _plain(HTTPStatus.METHOD_NOT_ALLOWED, keep=request.keep)
            return self._receive(request, ip)
        if request.path.startswith("/simulator/"):
            return self._control(request)
        return _plain(HTTPStatus.NOT_FOUND, keep=request.keep)

    def malformed(self) -> None:
        """Count bytes that were no request."""
        self._log.malformed += 1

    def _receive(self, http: HttpRequest, ip: str) -> Reaction:
        now, wall = time.monotonic(), time.time() + self.config.clock_offset
        get = (parameters := decode(http.query) or {}).get
        request = Request(
            get("user_id"),
            get("service_id"),
            get("msisdn"),
            get("text"),
            get("extended"),
            sound=bool(parameters),
        )
        nth = self._log.begin(request)
        drawn = draw(self.seed, request.service_id, request.msisdn, request.text, nth)
        faults = self.config.faults
        fault = one_of(drawn.fault, faults.rates)
        latency = between(faults.latency, drawn.latency)
        if fault is not None and fault is not Fault.LATE:
            self._log.end(request, ip, None, None, fault, wall=wall, now=now)
            if fault in (Fault.ERROR, Fault.GARBAGE):
                return Reaction(latency, *spoiled(fault, drawn.variant, keep=http.keep))
            return Reaction(latency, b"", keep=False, fault=fault)
        answer = self._provider.answer(request, ip, wall=wall, now=now)
        line: str = answer
        reports: tuple[Report, ...] = ()
        if answer is Answer.MSG_OK and request.extended:
            identifier = f"{int(drawn.identifier * 2**53):014x}"
            line = f"{answer}:{identifier}"
            if self.config.reports.url:
                reports = tuple(plan(self.config.reports, drawn, identifier))
        self._log.end(request, ip, answer, line, fault, wall=wall, now=now)
        content = response(200, line.encode("ascii"), keep=http.keep)
        return Reaction(latency, content, http.keep, fault, reports)

    def _control(self, request: HttpRequest) -> Reaction:
        keep = request.keep
        match request.method, request.path:
            case "GET", "/simulator/received":
                return _json(self.received(), keep=keep)
            case "GET", "/simulator/messages":
                after = parse_qs(request.query).get("after", ["0"])[0]
                if not after.isdecimal():
                    return _json({"error": "after must be a number."}, keep=keep, status=400)
                lines = "".join(line + "\n" for line in self._log.lines(int(after)))
                kind = "application/x-ndjson; charset=utf-8"
                return Reaction(0.0, response(200, lines.encode(), keep=keep, kind=kind), keep)
            case "POST", "/simulator/set":
                try:
                    self.set(json.loads(request.body))
                except ValueError as error:
                    return _json({"error": str(error)}, keep=keep, status=400)
                return _json({"ok": True}, keep=keep)
            case "POST", "/simulator/reset":
                self.reset()
                return _json({"ok": True}, keep=keep)
        return _plain(HTTPStatus.NOT_FOUND, keep=keep)


def _plain(status: HTTPStatus, *, keep: bool) -> Reaction:
    return Reaction(0.0, response(status, status.phrase.encode("ascii"), keep=keep), keep)


def _json(value: object, *, keep: bool, status: int = 200) -> Reaction:
    body = json.dumps(value, ensure_ascii=False).encode()
    return Reaction(0.0, response(status, body, keep=keep, kind="application/json"), keep)


class _Connection(asyncio.Protocol):
    """One client's connection; its requests are answered one after the other, in order."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._busy = False
        self._full = False
        self._paused = False
        self._hanging = False
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the connection and the address it comes from."""
        self._transport = cast(asyncio.Transport, transport)
        self._ip = str(transport.get_extra_info("peername")[0]).removeprefix("::ffff:")
        self._simulator.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the event loop's
        """Forget the connection; what was decided about its requests stands."""
        self._simulator.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are whole by now."""
        self._buffer += data
        self._go_on()
        if len(self._buffer) > _BUFFER_MAX and (self._busy or self._full) and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Stay open for the answers that a half-closed client still waits for."""
        self._ended = True
        return (self._busy or self._full) and not self._hanging

    def pause_writing(self) -> None:
        """Take no more requests from a client that does not read its answers."""
        self._full = True

    def resume_writing(self) -> None:
        """Go on, now that the client reads again."""
        self._full = False
        self._go_on()

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    def _go_on(self) -> None:
        while not (self._busy or self._full or self._transport.is_closing()):
            request = take(self._buffer)
            if request is None:
                if self._ended:
                    self._transport.close()
                elif self._paused:
                    self._paused = False
                    self._transport.resume_reading()
                return
            if isinstance(request, Malformed):
                self._simulator.malformed()
                self._write(_plain(request.status, keep=False))
                return
            reaction = self._simulator.react(request, self._ip)
            early = next((r for r in reaction.reports if r.delay is None), None)
            if reaction.latency or reaction.fault or early:
                self._busy = True
                self._loop.call_later(reaction.latency, self._after_latency, reaction, early)
            else:
                self._write(reaction)

    def _after_latency(self, reaction: Reaction, early: Report | None) -> None:
        if early:
            self._simulator.reporter.push(early, then=lambda: self._finish(reaction))
        else:
            self._finish(reaction)

    def _finish(self, reaction: Reaction) -> None:
        if reaction.fault is Fault.HANG:
            self._hanging = True
            return
        self._busy = False
        self._write(reaction)
        self._go_on()

    def _write(self, reaction: Reaction) -> None:
        # The message is decided, so it is reported even when its client is gone.
        for report in reaction.reports:
            if report.delay is not None:
                self._simulator.reporter.push(report)
        if self._transport.is_closing():
            return
        if reaction.fault is Fault.RESET:
            # Closing with no time to linger sends a reset instead of an end.
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF
            )
            self._transport.abort()
            return
        if reaction.fault is None:
            self._transport.write(reaction.content)
        if reaction.fault or not reaction.keep:
            self._transport.close()
