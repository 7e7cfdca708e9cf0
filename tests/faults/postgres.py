"""A PostgreSQL server that a test may restart, kill, freeze and lock."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Final, Literal, TypeAlias

import asyncpg
import psutil

from dispatcher.db import migrations
from dispatcher.embedded import EmbeddedPostgres

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

TEMPLATE: Final = "dispatcher_template"

_numbers = count(1)


class Postgres:
    """One server, as durable as in earnest; a context manager that starts and ends it."""

    def __init__(self, directory: Path) -> None:
        self._server = EmbeddedPostgres(directory)

    @property
    def socket_path(self) -> str:
        """The Unix socket on which it listens."""
        return str(self._server._socket_dir() / ".s.PGSQL.5432")

    def dsn(self, database: str = "postgres") -> str:
        """The connection string of a database, straight to the server."""
        return self._server.dsn.replace("/postgres?", f"/{database}?")

    async def open(self) -> None:
        """Start it for the first time, with an empty database of our schema to copy."""
        await asyncio.to_thread(self._server.start)
        await self.run("CREATE DATABASE unfinished")
        await migrations.upgrade(self.dsn("unfinished"))
        await self.run(f"ALTER DATABASE unfinished RENAME TO {TEMPLATE}")

    def close(self) -> None:
        """End it, in whatever state it is."""
        for process in self._processes():
            process.send_signal(SIGCONT)
        self._server.stop()

    async def run(self, *statements: str, database: str = "postgres") -> None:
        """Run statements, each by itself, as the superuser."""
        connection = await asyncpg.connect(self.dsn(database))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    @asynccontextmanager
    async def database(self, *, empty: bool = False) -> AsyncIterator[str]:
        """The name of a fresh database, dropped in the end; `empty`: without our schema."""
        await self.start()
        name = f"faults_{os.getpid()}_{next(_numbers)}"
        await self.run(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else TEMPLATE}")
        try:
            yield name
        finally:
            self.thaw()
            await self.start()
            await self.run("ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")
            await self.run(
                "SET default_transaction_read_only = off", f"DROP DATABASE {name} WITH (FORCE)"
            )

    @asynccontextmanager
    async def connection(self, database: str) -> AsyncIterator[Connection]:
        """A connection straight to a database."""
        connection = await asyncpg.connect(self.dsn(database))
        try:
            yield connection
        finally:
            await connection.close(timeout=10)

    async def stop(self, mode: Literal["fast", "immediate"]) -> None:
        """Stop it: `fast` tells the clients, `immediate` is a crash."""
        await asyncio.to_thread(self._server._run, "pg_ctl", "stop", "-D.", "-s", "-w", f"-m{mode}")

    async def start(self) -> None:
        """Start it again, unless it runs."""
        await asyncio.to_thread(self._server._ensure_running, self._server._socket_dir())

    async def kill(self) -> None:
        """Kill the postmaster; its children follow."""
        family = self._processes()
        family[0].send_signal(SIGKILL)
        await asyncio.to_thread(psutil.wait_procs, family, 30)

    def freeze(self) -> None:
        """Stop all its processes where they are."""
        self._signal(SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(SIGCONT)

    def _signal(self, number: Signals) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        """The postmaster and its children; none if it does not run."""
        try:
            number = int((self._server.directory / "postmaster.pid").read_text().split("\n")[0])
            postmaster = psutil.Process(number)
            return [postmaster, *postmaster.children(recursive=True)]
        except (FileNotFoundError, psutil.NoSuchProcess):
            return []
