"""Fixtures for every test: a PostgreSQL server, and a fresh migrated database for each test."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aioresponses.core
import asyncpg
import pytest
from aiohttp import ClientResponse
from aiohttp.abc import AbstractStreamWriter

from dispatcher.db import migrations
from dispatcher.embedded import EmbeddedPostgres
from tests import scratch

# One server serves the whole run: pytest-xdist's workers inherit the variable and join it.
SERVER_DIRECTORY = "TEST_POSTGRES_DIRECTORY"
TEMPLATE = "dispatcher_template"
NUMBERS = count()

_directories: list[tempfile.TemporaryDirectory[str]] = []


class _MockedResponse(ClientResponse):
    """What aioresponses answers with; its 0.7.9 does not know aiohttp 3.14's `stream_writer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, stream_writer=Mock(spec=AbstractStreamWriter), **kwargs)


setattr(aioresponses.core, "ClientResponse", _MockedResponse)  # noqa: B010 - mypy: cannot assign to a type


def pytest_configure(config: pytest.Config) -> None:
    """Makes the server's directory, in the process that is started first."""
    # A shell that starts the run in its background has the first ignored, nohup the second, by all
    # that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if SERVER_DIRECTORY not in os.environ:
        directory = scratch.directory("tests")
        _directories.append(directory)
        os.environ[SERVER_DIRECTORY] = directory.name


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers a core: half of the time a test waits for a process or for a moment."""
    return 2 * (os.cpu_count() or 1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes it, when all workers have left."""
    for directory in _directories:
        directory.cleanup()


def database_dsn(server_dsn: str, name: str) -> str:
    """The connection string of another database on the same server."""
    return server_dsn.replace("/postgres?", f"/{name}?")


async def _execute(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _prepare(dsn: str) -> None:
    """Makes the template database, once for all workers, on a server that need not survive."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("SELECT pg_advisory_lock(1)")
        if await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", TEMPLATE):
            return
        for setting in ("fsync = off", "full_page_writes = off", "max_wal_size = '256MB'"):
            await connection.execute(f"ALTER SYSTEM SET {setting}")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.execute("CREATE DATABASE unfinished")
        await migrations.upgrade(database_dsn(dsn, "unfinished"))
        await connection.execute(f"ALTER DATABASE unfinished RENAME TO {TEMPLATE}")
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The server of this run, shared by all workers; quick, and not durable."""
    with EmbeddedPostgres(Path(os.environ[SERVER_DIRECTORY])) as server:
        asyncio.run(_prepare(server.dsn))
        yield server


@contextmanager
def _fresh(postgres: EmbeddedPostgres) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(NUMBERS)}"
    asyncio.run(_execute(postgres.dsn, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    yield database_dsn(postgres.dsn, name)
    asyncio.run(_execute(postgres.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The connection string of a fresh, migrated database."""
    with _fresh(postgres) as dsn:
        yield dsn


@pytest.fixture
def other_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The connection string of another one."""
    with _fresh(postgres) as dsn:
        yield dsn


@pytest.fixture
async def connection(database: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """A connection to the test's database."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory for a server of the test's own.

    Not under `tmp_path`: run by root, pytest closes the way to it to PostgreSQL's user whenever
    another run starts.
    """
    with scratch.directory("test") as directory:
        yield Path(directory)


@pytest.fixture
def durable_postgres(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A server for this test alone, migrated and as durable as in earnest, to be killed."""
    with EmbeddedPostgres(data_dir) as server:
        asyncio.run(migrations.upgrade(server.dsn))
        yield server
