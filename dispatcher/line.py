"""One connection to the provider: a request goes out, its answer comes in, and nothing else may.

aiohttp opens the connection, and its parser reads the answers. Its own protocol between the two is
for all of HTTP: it took a tenth of the worker's time for what one short answer does not need, and
what comes unasked it may keep for the next request. So it steps aside until the end.
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
        encrypted: Whether it speaks TLS.
    """

    def __init__(self, connection: Connection, *, encrypted: bool) -> None:
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
            if not encrypted:
                # Under TLS the socket's bytes may be the protocol's own and say nothing.
                self._unread = _unread(self.transport.get_extra_info("socket").fileno())

    @property
    def usable(self) -> bool:
        """Whether the next request may be written as far as this process has been told."""
        return not (
            self._spoilt or self._paused or self.transport is None or self.transport.is_closing()
        )

    @property
    def ready(self) -> bool:
        """Whether a request may be written: the connection is open, and nothing has come on it.

        What has come unasked would be taken for its answer. And a provider may close after an
        answer without announcing it: under load the connection is taken for the next request
        before the loop has read of its end, and half of all messages would be in doubt. So the
        socket itself is asked.
        """
        return self.usable and (self._unread is None or not self._unread())

    def ask(self, request: bytes) -> asyncio.Future[Whole]:
        """Write a request at once, to a line that is ready; the future brings its answer.

        The future raises NoAnswer, and OSError if the connection broke.
        """
        if self.transport is None:
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
            self._spoilt = True
            return
        try:
            messages, upgraded, _ = reader.feed_data(data)
            self._spoilt = self._spoilt or upgraded
            for head, content in messages:
                self._take(head, content)
            if self._content is not None:
                self._read(self._content, waiting)
        except Exception:  # noqa: BLE001 - a stranger's bytes; whatever they upset, it is no answer
            self._fail(waiting, NoAnswer("answer is not HTTP"))

    def _take(self, head: RawResponseMessage, content: StreamReader) -> None:
        if self._content is not None:
            self._spoilt = True  # a second answer, which nobody asked for
        elif not _announces(head.code):
            self._status, self._content = head.code, content
            self._spoilt = self._spoilt or head.should_close

    def _read(self, content: StreamReader, waiting: asyncio.Future[Whole]) -> None:
        self.received += content.read_nowait(MAX_ANSWER + 1 - len(self.received))
        if len(self.received) > MAX_ANSWER:
            self._fail(waiting, NoAnswer("answer too long"))
        elif content.is_eof():
            waiting.set_result(Whole(self._status, self.received))
            # Nothing of it stays here: it could hold the text.
            self._reader = self._content = self._waiting = None
            self.received = b""

    def _fail(self, waiting: asyncio.Future[Whole], error: Exception) -> None:
        self._spoilt = True
        self._reader = None
        waiting.set_exception(error)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See what has come; the end may be that of an answer without a length."""
        reader, waiting = self._reader, self._waiting
        if reader is not None and waiting is not None and not waiting.done():
            self._end(reader, waiting, exc)
        self._reader = None
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
        the connection was closed in order; after a reset it is not.
        """
        broken = error if isinstance(error, OSError) else None
        try:
            reader.feed_eof()
        except Exception:  # noqa: BLE001 - as in data_received
            self._fail(waiting, NoAnswer("answer cut short"))
            return
        content = self._content
        if content is None:
            self._fail(waiting, broken or NoAnswer("connection closed without an answer"))
        elif broken is not None or not content.is_eof():
            self._fail(waiting, NoAnswer("answer cut short"))
        else:
            self._read(content, waiting)

    def pause_reading(self) -> None:
        """Go on: an answer that is too long ends the connection at once."""

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's
        """Go on: nothing was paused."""


def _announces(status: int) -> bool:
    """Whether a head only says that the answer's own is to come."""
    return 100 <= status < 200 and status != HTTPStatus.SWITCHING_PROTOCOLS


if sys.platform == "win32":  # pragma: no cover

    def _unread(descriptor: int) -> Callable[[], bool]:
        return lambda: bool(select.select([descriptor], [], [], 0)[0])

else:

    def _unread(descriptor: int) -> Callable[[], bool]:
        """Tell, whenever called, whether bytes or an end wait in a socket to be read."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return lambda: bool(poll.poll(0))
