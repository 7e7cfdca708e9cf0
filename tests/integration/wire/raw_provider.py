"""A provider made of bare sockets: counts what reaches it, and answers as badly as it is told."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self
from urllib.parse import unquote_to_bytes


class Received:
    """One whole request, and the connection it came on."""

    def __init__(self, head: bytes, number: int, on_connection: int, line: "Line") -> None:
        self.head = head
        self.number = number
        """Counts the requests of all connections, from 1."""
        self.on_connection = on_connection
        """Counts the requests of this connection, from 1."""
        self.line = line

    @property
    def target(self) -> str:
        """The path and query, as they stand in the request line."""
        method, target, version = self.head.split(b"\r\n", 1)[0].split(b" ")
        assert (method, version) == (b"GET", b"HTTP/1.1")
        return target.decode("ascii")

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """The query's parameters in order, decoded by RFC 3986: a plus is a plus."""
        pairs = (pair.split("=", 1) for pair in self.target.partition("?")[2].split("&"))
        return [(name, unquote_to_bytes(value).decode("utf-8")) for name, value in pairs]


class Line:
    """The provider's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def write(self, *pieces: bytes) -> None:
        """Write each piece by itself.

        Raises:
            ConnectionResetError: The client has gone; uvloop would raise a RuntimeError.
        """
        for piece in pieces:
            if self.writer.is_closing():
                raise ConnectionResetError
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self, body: bytes = b"MSG_OK:1", status: bytes = b"200 OK") -> None:
        """Answer as a good provider does, and keep the connection."""
        await self.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    def write_now(self, data: bytes) -> None:
        """Write past the event loop: the peer's kernel has it when this returns."""
        with self._socket() as duplicate:
            duplicate.sendall(data)

    def hang_up(self) -> None:
        """Close in order (FIN), past the event loop likewise."""
        with self._socket() as duplicate:
            duplicate.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with a reset (RST)."""
        with self._socket() as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def _socket(self) -> socket.socket:
        original = self.writer.get_extra_info("socket")
        return socket.fromfd(original.fileno(), original.family, original.type)


Script = Callable[[Received], Awaitable[None]]


async def well(request: Received) -> None:
    """The script of a good provider."""
    await request.line.answer(b"MSG_OK:%d" % request.number)


class RawProvider:
    """Listens on a free port and plays a script for each request; an async context manager.

    A connection stays open after its script until the script or the client closes it. With `tls`
    it speaks TLS, and what is written past the event loop is for others.
    """

    def __init__(self, script: Script = well, *, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self._tls = tls
        self.requests: list[Received] = []
        self.rests: list[bytes] = []
        """What came on a connection and was no whole request."""
        self.lines: list[Line] = []
        self.connected = asyncio.Event()
        """Set once a first connection is there."""
        self.on_connect: Callable[[Line], None] | None = None
        """Called for each new connection."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The address to send to, without a query."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/send.php"

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, backlog=1024, ssl=self._tls
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for line in self.lines:
            line.writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        if self._errors and kind is None:
            raise ExceptionGroup("the raw provider's script failed", self._errors)

    async def all_closed(self) -> None:
        """Wait until no connection is open, because the client or the script closed it."""
        async with asyncio.timeout(20):
            while self._tasks:
                await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        line = Line(reader, writer)
        self.lines.append(line)
        self.connected.set()
        count = 0
        try:
            if self.on_connect is not None:
                self.on_connect(line)
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                count += 1
                request = Received(head, len(self.requests) + 1, count, line)
                self.requests.append(request)
                await self.script(request)
        except asyncio.IncompleteReadError as rest:
            if rest.partial:
                self.rests.append(rest.partial)
        except ConnectionError:
            pass  # the client has gone, as it may
        except asyncio.CancelledError:
            pass  # the test is over
        except Exception as error:  # noqa: BLE001 - raised again when the test ends
            self._errors.append(error)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
