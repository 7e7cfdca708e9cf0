"""A proxy between a worker and its database that fails as networks and servers do.

It reads the frontend protocol far enough to know which statement is run, so that a test can lose
the answer to a claim that was executed, keep back a statement until its client has given up, or
refuse a statement with an error of its own.
"""

from __future__ import annotations

import asyncio
import struct
from enum import Enum, auto
from types import TracebackType
from typing import Final, Self

_SSL_REQUEST: Final = 80877103
_CANCEL_REQUEST: Final = 80877102
_CHUNK: Final = 2**16


class _Kind(Enum):
    SWALLOW = auto()
    HANG = auto()
    LOSE = auto()
    HOLD = auto()
    REFUSE = auto()


class Trap:
    """What is to happen to a statement, and how often it has."""

    def __init__(self, kind: _Kind, sql: str, times: int, answer: bytes = b"") -> None:
        self.kind = kind
        self.sql = sql
        self.left = times
        self.answer = answer
        self.sprung = 0
        """How many runs of the statement it has caught."""
        self._caught = asyncio.Event()
        self._released = asyncio.Event()

    async def caught(self, within: float = 45.0) -> None:
        """Wait until it has caught one; when an answer is lost, until the server had given it."""
        async with asyncio.timeout(within):
            await self._caught.wait()

    def lift(self) -> None:
        """Catch nothing more, and let go what is kept back."""
        self.left = 0
        self._released.set()

    def _spring(self) -> None:
        self.sprung += 1
        self._caught.set()


class _Messages:
    """Cuts a stream into the protocol's messages."""

    def __init__(self, *, untyped: int) -> None:
        self._buffer = b""
        self.untyped = untyped
        """How many messages without a type byte are still to come."""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """All messages that are complete by now, as (type, whole message)."""
        self._buffer += data
        found: list[tuple[bytes, bytes]] = []
        while True:
            head = 0 if self.untyped else 1
            if len(self._buffer) < head + 4:
                return found
            size = head + int(struct.unpack_from("!I", self._buffer, head)[0])
            if len(self._buffer) < size:
                return found
            message, self._buffer = self._buffer[:size], self._buffer[size:]
            if not head:
                (code,) = struct.unpack_from("!I", message, 4)
                if code not in {_SSL_REQUEST, _CANCEL_REQUEST}:
                    self.untyped = 0
            found.append((message[:head], message))


class _Link:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._statements: dict[bytes, str] = {}
        self._losing: Trap | None = None
        self._trap: Trap | None = None

    def abort(self) -> None:
        """Break both halves at once."""
        self._to_client.transport.abort()
        self._to_server.transport.abort()

    async def carry(self) -> None:
        """Carry bytes both ways until both ends have closed."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests())
                group.create_task(self._answers())
        finally:
            self.abort()

    async def _requests(self) -> None:
        messages = _Messages(untyped=1)
        try:
            while data := await self._from_client.read(_CHUNK):
                for kind, message in messages.feed(data):
                    await self._proxy.passage()
                    await self._request(kind, message)
            # A client that gave up may have left requests behind: the server still runs them.
            await self._proxy.passage()
            self._to_server.write_eof()
        except (ConnectionError, RuntimeError):
            self._to_server.transport.abort()

    async def _request(self, kind: bytes, message: bytes) -> None:
        if kind == b"P":
            name, sql = message[5:].split(b"\0", 2)[:2]
            self._statements[name] = sql.decode()
        elif kind == b"B":
            name = message[5:].split(b"\0", 2)[1]
            self._trap = self._proxy.trap(self._statements.get(name, ""))
            match self._trap:
                case Trap(kind=_Kind.SWALLOW | _Kind.HANG) as trap:
                    self._losing = trap
                case Trap(kind=_Kind.LOSE) as trap:
                    trap._spring()
                    self.abort()
                case Trap(kind=_Kind.HOLD) as trap:
                    trap._spring()
                    await trap._released.wait()
        if self._trap is not None and self._trap.kind is _Kind.REFUSE:
            if kind == b"S":  # all until here belonged to the refused statement
                self._to_client.write(self._trap.answer)
                self._trap._spring()
                self._trap = None
            return
        if kind == b"S":
            self._trap = None
        self._to_server.write(message)
        await self._to_server.drain()

    async def _answers(self) -> None:
        messages = _Messages(untyped=0)
        try:
            while data := await self._from_server.read(_CHUNK):
                await self._proxy.passage()
                if self._losing is None:
                    self._to_client.write(data)
                    await self._to_client.drain()
                    continue
                # Ready for the next query: the statement's transaction is over.
                if any(kind == b"Z" for kind, _ in messages.feed(data)):
                    losing, hang = self._losing, self._losing.kind is _Kind.HANG
                    if not hang:
                        self.abort()
                    losing._spring()
            await self._proxy.passage()
        except (ConnectionError, RuntimeError):
            pass  # the client has gone; what it asked for still reaches the server
        finally:
            if self._losing is None or self._losing.kind is not _Kind.HANG:
                self._to_client.close()


class Proxy:
    """Listens on a free port of this machine for a server at a Unix socket."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._port = 0
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._traps: list[Trap] = []
        self._thawed = asyncio.Event()
        self._thawed.set()
        self.delay = 0.0
        """Seconds by which everything is late, each way."""
        self.connections = 0
        """How many have been opened through it."""

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def dsn(self, database: str) -> str:
        """The connection string of a database, by way of this proxy."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/{database}?sslmode=disable"

    async def listen(self) -> None:
        """Take connections, again on the same port if it did before."""
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self._port, backlog=256
        )
        self._port = self._server.sockets[0].getsockname()[1]

    def shut(self) -> None:
        """Refuse new connections and cut those there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def cut(self) -> None:
        """Reset all connections; new ones are taken."""
        for link in list(self._links):
            link.abort()

    def freeze(self) -> None:
        """Carry nothing, and tell nobody; connections stay open."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Carry on, with what was sent meanwhile."""
        self._thawed.set()

    def swallow(self, sql: str, times: int = 1) -> Trap:
        """Have a statement run, and cut the connection instead of passing on its answer."""
        return self._set(Trap(_Kind.SWALLOW, sql, times))

    def hang(self, sql: str, times: int = 1) -> Trap:
        """Have a statement run, and pass on nothing any more on its connection."""
        return self._set(Trap(_Kind.HANG, sql, times))

    def lose(self, sql: str, times: int = 1) -> Trap:
        """Cut the connection before a statement reaches the server."""
        return self._set(Trap(_Kind.LOSE, sql, times))

    def hold(self, sql: str, times: int = 1) -> Trap:
        """Keep a statement back until lifted; it runs then, also if its client has given up."""
        return self._set(Trap(_Kind.HOLD, sql, times))

    def refuse(self, sql: str, sqlstate: str, times: int = 10**9) -> Trap:
        """Answer a statement with an error, as if the server had."""
        fields = b"".join(
            b"%b%b\0" % (code, value.encode())
            for code, value in (
                (b"S", "ERROR"),
                (b"V", "ERROR"),
                (b"C", sqlstate),
                (b"M", f"refused by the proxy with {sqlstate}"),
            )
        )
        error = b"E" + struct.pack("!I", len(fields) + 5) + fields + b"\0"
        return self._set(Trap(_Kind.REFUSE, sql, times, error + b"Z\0\0\0\5I"))

    def _set(self, trap: Trap) -> Trap:
        self._traps.append(trap)
        return trap

    def trap(self, sql: str) -> Trap | None:
        """What is to happen to a statement that is run now."""
        for trap in self._traps:
            if trap.left > 0 and trap.sql == sql:
                trap.left -= 1
                return trap
        return None

    async def passage(self) -> None:
        """Wait as long as the link is frozen, and for its delay."""
        await self._thawed.wait()
        if self.delay:
            await asyncio.sleep(self.delay)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            server = await asyncio.open_unix_connection(self._socket_path)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        link = _Link(self, (reader, writer), server)
        self._links.add(link)
        try:
            await link.carry()
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            self._links.discard(link)
            self._tasks.discard(task)
