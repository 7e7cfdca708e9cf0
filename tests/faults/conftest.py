"""A server to break, a proxy before it, and a provider with books, for each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import scratch
from tests.builders import add_service
from tests.e2e.harness import Worker, worker
from tests.faults.postgres import Connection, Postgres
from tests.faults.provider import Provider
from tests.faults.proxy import Proxy


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """A server of this test process alone."""
    with scratch.directory("faults") as directory:
        server = Postgres(Path(directory))
        asyncio.run(server.open())
        yield server
        server.close()


class Scene:
    """A database behind a proxy, a provider, and workers between the two."""

    def __init__(
        self,
        postgres: Postgres,
        database: str,
        connection: Connection,
        proxy: Proxy,
        provider: Provider,
        stack: AsyncExitStack,
    ) -> None:
        self.postgres = postgres
        self.database = database
        self.connection = connection
        self.proxy = proxy
        self.provider = provider
        self._stack = stack
        self.workers: list[Worker] = []

    async def worker(self, *, direct: bool = False, **settings: Any) -> Worker:
        """A worker that has entered itself; `direct`: past the proxy."""
        chosen = {"lease": 2, "request_timeout": 5, **settings}
        way = self.postgres if direct else self.proxy
        running = await self._stack.enter_async_context(
            worker(way.dsn(self.database), self.provider.url, **chosen)
        )
        self.workers.append(running)
        await running.started()
        return running


@pytest.fixture
async def scene(server: Postgres) -> AsyncIterator[Scene]:
    """A database with one service, a provider that takes all, and no worker yet."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(server.database())
        connection = await stack.enter_async_context(server.connection(database))
        await add_service(connection)
        proxy = await stack.enter_async_context(Proxy(server.socket_path))
        provider = await stack.enter_async_context(Provider())
        yield Scene(server, database, connection, proxy, provider, stack)
