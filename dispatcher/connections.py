"""Open connections to the provider, and how they are kept between two messages.

aiohttp opens them. Its connector would keep them too, but to hand one in and ask for it again took
a fifth of the client's time for each message, measured; so they are kept here, and the one that
was used last goes out first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, NamedTuple

import aiohttp
from yarl import URL

from dispatcher import clock
from dispatcher.line import Line

_ENDLESS: Final = aiohttp.ClientTimeout()
"""For aiohttp: the caller's deadline is the only one."""


class _Idle(NamedTuple):
    since: float
    line: Line


class Connections:
    """Connections to one address, made in a running event loop.

    Args:
        address: Where to, without a query; aiohttp's errors, caches and logs may hold it.
        limit: Connections at most.
        keepalive: Seconds an idle connection is kept.
    """

    def __init__(self, address: URL, *, limit: int, keepalive: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._connector = aiohttp.TCPConnector(
            limit=limit,
            keepalive_timeout=keepalive,
            ttl_dns_cache=60,
            resolver=aiohttp.ThreadedResolver(),
        )
        # Tells the connector where to; never sent itself.
        self._route = aiohttp.ClientRequest("GET", address, loop=self._loop)
        self._keepalive = keepalive
        self._idle: deque[_Idle] = deque()
        self._opening = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def closed(self) -> bool:
        """Whether no more can be taken."""
        return self._connector.closed

    def take(self) -> Line | None:
        """Take the one that was used last and is open as far as is known; None if there is none."""
        while self._idle:
            since, line = self._idle.pop()
            if clock.now() - since <= self._keepalive and line.usable:
                return line
            line.close()
        return None

    async def open(self) -> Line:
        """Open one; wait while all there may be are in use.

        Raises aiohttp.ClientError and OSError as aiohttp's connector does.
        """
        self._opening += 1
        try:
            connection = await self._connector.connect(self._route, traces=[], timeout=_ENDLESS)
        finally:
            self._opening -= 1
        return Line(connection)

    def give_back(self, line: Line) -> None:
        """Keep one for the next message, unless it has to be closed."""
        if self._opening or self.closed or not line.usable:
            line.release()
            return
        self._idle.append(_Idle(clock.now(), line))
        if self._timer is None:
            self._timer = self._loop.call_later(self._keepalive, self._close_stale)

    async def close(self) -> None:
        """Close all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._idle:
            self._idle.pop().line.release()
        # It waits for their end, as it should with TLS.
        await self._connector.close()

    def _close_stale(self) -> None:
        now = clock.now()
        while self._idle and now - self._idle[0].since >= self._keepalive:
            self._idle.popleft().line.close()
        self._timer = None
        if self._idle:
            left = self._keepalive - (now - self._idle[0].since)
            self._timer = self._loop.call_later(max(left, 0.001), self._close_stale)
