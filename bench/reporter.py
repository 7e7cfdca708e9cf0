"""Delivers reports at a rate, from a process of its own: `python -m bench.reporter URL RATE`.

Prints a line when the first report is answered; when it is asked to end, how many were answered
with OK and how many otherwise, and for how many seconds it went.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from functools import partial
from typing import Final, cast
from urllib.parse import SplitResult, urlsplit

import uvloop

CONNECTIONS: Final = 100
TICK: Final = 0.005


class _Line(asyncio.Protocol):
    """One kept connection; it is free when its last report has been answered."""

    _transport: asyncio.Transport

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reporter.free.append(self)

    def send(self, request: bytes) -> None:
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._reporter.answered(ok=data.startswith(b"HTTP/1.1 200"))
        self._reporter.free.append(self)


class Reporter:
    """What has been delivered so far."""

    def __init__(self, address: SplitResult, rate: float) -> None:
        self._address = address
        self._rate = rate
        self.free: list[_Line] = []
        self._sent = self._taken = self._refused = 0

    def answered(self, *, ok: bool) -> None:
        """Count an answer."""
        if not self._taken:
            os.write(1, b"begun\n")
        self._taken += ok
        self._refused += not ok

    async def run(self) -> None:
        """Deliver until asked to end."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, ended.set)
        host, port = self._address.hostname, self._address.port
        assert host is not None
        assert port is not None
        for _ in range(CONNECTIONS):
            await loop.create_connection(partial(_Line, self), host, port)
        began = time.monotonic()
        while not ended.is_set():
            due = int((time.monotonic() - began) * self._rate)
            while self._sent < due and self.free:
                self.free.pop().send(self._request())
            await asyncio.sleep(TICK)
        seconds = time.monotonic() - began
        os.write(1, b"%d %d %.3f\n" % (self._taken, self._refused, seconds))

    def _request(self) -> bytes:
        self._sent += 1
        path, host = self._address.path, self._address.netloc
        return (
            f"GET {path}?sms_id=r{self._sent}&status=DELIVRD HTTP/1.1\r\nHost: {host}\r\n\r\n"
        ).encode()


if __name__ == "__main__":
    uvloop.run(Reporter(urlsplit(sys.argv[1]), float(sys.argv[2])).run())
