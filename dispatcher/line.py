"""One connection to the provider: a request goes out, its answer comes in, and nothing else may.

aiohttp opens the connection, and its parser reads the answers. The protocol that it puts between
the two serves all of HTTP: it took a tenth of the worker's time, measured, and of what comes
unasked it may keep a part for the next request. So it steps aside while a connection is ours.
"""

from __future__ import annotations

import asyncio
import select
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, NamedTuple

from aiohttp.base_protocol import BaseProtocol
from aiohttp.connector import Connection
from aiohttp.http import HttpResponseParser, RawResponseMessage
from aiohttp.streams import StreamReader

MAX_ANSWER: Final = 4096
"""Most bytes of an answer's body; a longer one is no answer (the provider's are one short line)."""


class Whole(NamedTuple):
    """A whole answer, of whatever status; the body's bytes are as received."""

    status: int
    body: bytes


class NoAnswer(Exception):
    """No whole answer came; says why in a short plain phrase."""


class Line(BaseProtocol):
    """A connection that is open as far as is known, made in a running event loop.

    Args:
        connection: What aiohttp has opened.
    """

    def __init__(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(loop)
        self._connection = connection
        self._theirs = connection.protocol
        self._spoilt = self._theirs is None or self._theirs.should_close
        self._unread: Callable[[], bool] | None = None
        self._waiting: asyncio.Future[Whole] | None = None
        self._reader: HttpResponseParser | None = None
        self._status = 0
        self._content: StreamReader | None = None
        self.received = b""
        """What has come of the body of an answer that is not whole."""
        self.transport = connection.transport
        if self.transport is not None:
            self.transport.set_protocol(self)
            socket = self.transport.get_extra_info("socket")
            self._unread = None if socket is None else _unread_in(socket.fileno())

    @property
    def usable(self) -> bool:
        """Whether the next request may be written as far as this process has been told."""
        return not (
            self._spoilt
            or self._waiting is not None
            or self.transport is None
            or self.transport.is_closing()
        )

    @property
    def ready(self) -> bool:
        """Whether a request may be written: the connection is open, and nothing has come on it.

        What has come unasked would be taken for its answer. And a provider may close after an
        answer without announcing it: under load the connection is taken for the next request
        before the loop has read of its end, and half of all messages would be in doubt. So the
        socket itself is asked. A line that is usable and not ready may be so once the loop has
        read: under TLS what has come may be the protocol's own.
        """
        return self.usable and self._unread is not None and not self._unread()

    def ask(self, request: bytes) -> asyncio.Future[Whole]:
        """Write a request at once, to a line that is ready; the future brings its answer.

        The future raises NoAnswer, and OSError if the connection broke. Raises RuntimeError on a
        line that is lost or still waits for an answer.
        """
        if self.transport is None or self._waiting is not None:
            raise RuntimeError("the line is not ready")
        self._reader = HttpResponseParser(
            self,
            self._loop,
            MAX_ANSWER,
            max_headers=64,
            read_until_eof=True,
            auto_decompress=False,
        )
        self._waiting = waiting = self._loop.create_future()
        self.transport.write(request)
        return waiting

    def release(self) -> None:
        """Hand the connection back to aiohttp, to close it or to keep it for those who wait."""
        if not self.usable:
            self.close()
            return
        if self.transport is not None and self._theirs is not None:
            self.transport.set_protocol(self._theirs)
        self._connection.release()

    def close(self) -> None:
        """Close the connection; what still comes on it is dropped."""
        self._spoilt = True
        self._connection.close()

    def data_received(self, data: bytes) -> None:
        """Read on in the answer."""
        reader, waiting = self._reader, self._waiting
        if reader is None or waiting is None or waiting.done():
            # Nothing was asked, so it is nobody's answer.
            self.close()
            return
        try:
            messages, _, _ = reader.feed_data(data)
            for head, content in messages:
                self._take(head, content)
            if self._content is not None:
                self._read(self._content, reader, waiting)
        except Exception:  # noqa: BLE001 - a stranger's bytes; whatever they upset, it is no answer
            if self._content is not None:
                self._keep(self._content)
            self._fail(waiting, NoAnswer("answer is not HTTP"))

    def _take(self, head: RawResponseMessage, content: StreamReader) -> None:
        if self._content is not None:
            self._spoilt = True  # a second answer, which nobody asked for
        elif not _announces(head.code):
            self._status, self._content = head.code, content
            last = head.should_close or head.code == HTTPStatus.SWITCHING_PROTOCOLS
            self._spoilt = self._spoilt or last

    def _read(
        self, content: StreamReader, reader: HttpResponseParser, waiting: asyncio.Future[Whole]
    ) -> None:
        self._keep(content)
        if len(self.received) > MAX_ANSWER:
            self._fail(waiting, NoAnswer("answer too long"))
        elif content.is_eof():
            self._spoilt = self._spoilt or _has_begun_another(reader)
            whole = Whole(self._status, self.received)
            # Nothing of it stays here: it could hold the text.
            self._reader = self._content = self._waiting = None
            self.received = b""
            waiting.set_result(whole)

    def _keep(self, content: StreamReader) -> None:
        if content.exception() is None:
            self.received += content.read_nowait(MAX_ANSWER + 1 - len(self.received))

    def _fail(self, waiting: asyncio.Future[Whole], error: Exception) -> None:
        self._spoilt = True
        # The error leads to all that waited for the answer, and must not be led back to.
        self._reader = self._content = self._waiting = None
        waiting.set_exception(error)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See what has come; the end may be that of an answer without a length."""
        reader, waiting = self._reader, self._waiting
        if reader is not None and waiting is not None and not waiting.done():
            self._end(reader, waiting, exc)
        super().connection_lost(exc)
        if self._theirs is not None:
            self._theirs.connection_lost(exc)

    def _end(
        self,
        reader: HttpResponseParser,
        waiting: asyncio.Future[Whole],
        error: BaseException | None,
    ) -> None:
        """Tell an answer that ends with the connection from one that was cut short.

        Without a length the two look alike, and such servers exist, so it is taken for whole if
        the provider closed the connection in order.
        """
        content = self._content
        in_order = error is None and not self._closed_by_us()
        try:
            reader.feed_eof()
        except Exception:  # noqa: BLE001 - as in data_received
            self._fail(waiting, NoAnswer("answer cut short"))
            return
        if content is None:
            broken = error if isinstance(error, OSError) else None
            self._fail(waiting, broken or NoAnswer("connection closed without an answer"))
        elif in_order and content.is_eof():
            self._read(content, reader, waiting)
        else:
            self._fail(waiting, NoAnswer("answer cut short"))

    def _closed_by_us(self) -> bool:
        return self._theirs is None or self._theirs.transport is None

    def pause_reading(self) -> None:
        """Go on: an answer that is too long ends the connection."""

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's
        """Go on: nothing was paused."""


def _announces(status: int) -> bool:
    """Whether a head only says that the answer's own is to come."""
    return 100 <= status < 200 and status != HTTPStatus.SWITCHING_PROTOCOLS


def _has_begun_another(reader: HttpResponseParser) -> bool:
    """Whether more came with an answer than the answer, though it is no whole head yet."""
    try:
        return reader.feed_eof() is not None
    except Exception:  # noqa: BLE001 - as in data_received
        return True


if sys.platform == "win32":  # pragma: no cover

    def _unread_in(descriptor: int) -> Callable[[], bool]:
        # Nothing is seen of what the loop's own pending read has taken already.
        return lambda: bool(select.select([descriptor], [], [], 0)[0])

else:

    def _unread_in(descriptor: int) -> Callable[[], bool]:
        """Tell, whenever called, whether bytes or an end wait in a socket to be read."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return lambda: bool(poll.poll(0))
