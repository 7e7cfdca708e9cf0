"""The HTTP side as tests use it: a real server on a free port, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import asyncpg
import structlog.testing

from dispatcher import settings
from dispatcher.metrics import Metrics
from dispatcher.server import Server

TOKEN = "s3cret-Token"


async def until(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = 20
) -> None:
    """Waits for a condition; raises TimeoutError when it does not come."""
    async with asyncio.timeout(seconds):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.01)


@dataclass
class Serving:
    """A server that takes reports, what it logged, and a client of it."""

    server: Server
    metrics: Metrics
    client: aiohttp.ClientSession
    events: list[Any]
    unready: str | None = None
    running: asyncio.Task[None] | None = None

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"http://127.0.0.1:{self.server.port}{path}"

    async def get(self, path: str, **parameters: str) -> tuple[int, str]:
        """The status and body of a GET."""
        async with self.client.get(self.url(path), params=parameters) as answer:
            return answer.status, await answer.text()

    async def report(self, identifier: str, word: str = "DELIVRD") -> int:
        """The status that a report gets for an answer."""
        status, _ = await self.get(f"/dlr/{TOKEN}", sms_id=identifier, status=word)
        return status

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A plain connection."""
        return await asyncio.open_connection("127.0.0.1", self.server.port)

    async def exchange(self, sent: bytes) -> bytes:
        """All that a plain connection is answered until it is closed."""
        reader, writer = await self.raw()
        writer.write(sent)
        async with asyncio.timeout(20):
            answered = await reader.read()
        writer.close()
        return answered

    def told(self, event: str) -> list[dict[str, Any]]:
        """The log lines of an event."""
        return [line for line in self.events if line["event"] == event]

    async def takes(self) -> None:
        """Waits until reports are taken."""
        await until(lambda: not self.server._intake._away)


@asynccontextmanager
async def serving(database: str, **given: Any) -> AsyncIterator[Serving]:
    """A server with the given settings, running, with its log captured."""
    metrics = Metrics()
    told = {"http_port": 0, "dlr_token": TOKEN, "database_url": database} | given
    with structlog.testing.capture_logs() as events:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
            Server(
                settings.load(**told),
                dsn=database,
                metrics=metrics,
                unready=lambda: it.unready,
            ) as server,
        ):
            it = Serving(server, metrics, client, events)
            it.running = asyncio.create_task(server.run())
            try:
                await it.takes()
                yield it
            finally:
                await server.close()
                await asyncio.wait([it.running])


async def shut(connection: asyncpg.Connection[asyncpg.Record], *, away: bool) -> None:
    """Makes the test's database unreachable for all but this connection, or reachable again."""
    # ALTER DATABASE may not do this to the database it is connected to.
    await connection.execute(
        "UPDATE pg_database SET datallowconn = $1 WHERE datname = current_database()", not away
    )
    if away:
        await connection.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid()
            """
        )
