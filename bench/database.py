"""The PostgreSQL of the benchmarks: one server of its own, as durable as in earnest."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import asyncpg
import psutil

from dispatcher.db import migrations
from dispatcher.embedded import EmbeddedPostgres

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

SETTINGS: Final = {
    # A checkpoint within one contender's turn and not another's would count against the first.
    "checkpoint_timeout": "30min",
    "max_wal_size": "8GB",
    # So that counts are of what ran, and not of what ran a minute ago.
    "stats_fetch_consistency": "none",
}
"""What is set beyond PostgreSQL's defaults; fsync and synchronous_commit stay on."""

TEMPLATE: Final = "migrated"


class Counters(NamedTuple):
    """What the server has done so far."""

    transactions: int
    wal_bytes: int


class Server:
    """The server, and the databases on it."""

    def __init__(self, embedded: EmbeddedPostgres, folder: Path) -> None:
        self.folder = folder
        self._dsn = embedded.dsn
        pid = int((embedded.directory / "postmaster.pid").read_text().split()[0])
        self._postmaster = psutil.Process(pid)
        self._numbers = count(1)

    def dsn(self, database: str) -> str:
        """The address of a database."""
        return self._dsn.replace("/postgres?", f"/{database}?")

    async def execute(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        async with self.connection("postgres") as connection:
            for statement in statements:
                await connection.execute(statement)

    @asynccontextmanager
    async def connection(self, database: str) -> AsyncIterator[Connection]:
        """A connection to a database."""
        connection = await asyncpg.connect(self.dsn(database), server_settings={"jit": "off"})
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def database(self, *, migrated: bool = False) -> AsyncIterator[str]:
        """A fresh database; with the dispatcher's tables if `migrated`. Yields its name."""
        name = f"bench_{next(self._numbers)}"
        template = f" TEMPLATE {TEMPLATE}" if migrated else ""
        await self.execute(f"CREATE DATABASE {name}{template}")
        yield name
        await self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    async def counters(self, database: str) -> Counters:
        """What was done in a database, and written to the log of the whole server."""
        async with self.connection("postgres") as connection:
            row = await connection.fetchrow(
                "SELECT xact_commit + xact_rollback AS transactions,"
                " pg_current_wal_lsn() - '0/0'::pg_lsn AS wal_bytes"
                " FROM pg_stat_database WHERE datname = $1",
                database,
            )
        assert row is not None
        return Counters(int(row["transactions"]), int(row["wal_bytes"]))

    def cpu(self) -> float:
        """Seconds of CPU of all its processes so far, those that have ended included."""
        own = self._postmaster.cpu_times()
        total = own.user + own.system + own.children_user + own.children_system
        for child in self._postmaster.children():
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue  # the postmaster has it among its own by the next look
            total += times.user + times.system
        return float(total)


@asynccontextmanager
async def running() -> AsyncIterator[Server]:
    """Run a server in a directory of its own, with a migrated template."""
    with (
        tempfile.TemporaryDirectory(prefix="dispatcher-bench-") as name,
        EmbeddedPostgres(Path(name)) as embedded,
    ):
        server = Server(embedded, Path(name))
        await server.execute(
            *(f"ALTER SYSTEM SET {key} = '{value}'" for key, value in SETTINGS.items()),
            "SELECT pg_reload_conf()",
            f"CREATE DATABASE {TEMPLATE}",
        )
        await migrations.upgrade(server.dsn(TEMPLATE))
        yield server
