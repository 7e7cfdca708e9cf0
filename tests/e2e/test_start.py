"""How a worker starts: what stops it, with one sentence, and what it waits for."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import asyncpg
import pytest

from dispatcher.embedded import EmbeddedPostgres
from tests.builders import add_message, add_service
from tests.conftest import TEMPLATE, database_dsn
from tests.e2e.harness import (
    Connection,
    Running,
    free_port,
    simulator,
    until_statuses,
    wait_for,
    worker,
)

NOWHERE = "http://127.0.0.1:1/"


async def refused(**environment: str) -> tuple[int, str]:
    """Exit code and standard error of a start that fails; it must print nothing else."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-worker-") as folder:
        running = await Running.start("run", folder=Path(folder), **environment)
        code = await running.exited()
    assert all(event["event"] == "http.listening" for event in running.events)
    return code, running.errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "sqlite:///sms.db"),
        ("DISPATCHER_LEASE", "soon"),
    ],
)
async def test_wrong_setting(name: str, value: str) -> None:
    """A wrong setting ends the start with code 2 and one sentence that names it."""
    code, error = await refused(**{name: value})

    assert code == 2
    assert error.startswith(f"{name} is wrong: ")
    assert error.count("\n") == 1
    assert error.endswith(".\n")


async def test_port_is_taken(database: str) -> None:
    """A port that is taken ends the start with code 2 and one sentence that names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, error = await refused(DATABASE_URL=database, DISPATCHER_HTTP_PORT=port)

    assert code == 2
    assert error == (
        f"DISPATCHER_HTTP_PORT is wrong: port {port} on 127.0.0.1 is taken; "
        "stop what uses it or set another port.\n"
    )


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ("DROP TABLE alembic_version", "run 'dispatcher migrate'.\n"),
        ("UPDATE alembic_version SET version_num = '9999'", "run a newer dispatcher.\n"),
    ],
)
async def test_schema_does_not_fit(
    database: str, connection: Connection, change: str, end: str
) -> None:
    """A schema that is behind or ahead ends the start with code 1 and says what to run."""
    await connection.execute(change)

    code, error = await refused(DATABASE_URL=database, DISPATCHER_HTTP_PORT="0")

    assert code == 1
    assert error.startswith("The database is at revision ")
    assert error.endswith(end)
    assert error.count("\n") == 1


async def test_database_is_away_at_the_start(postgres: EmbeddedPostgres) -> None:
    """A database that is not there yet is waited for, alive but not ready, and then used."""
    name = f"late_{free_port()}"
    dsn = database_dsn(postgres.dsn, name)
    admin = await asyncpg.connect(postgres.dsn)
    try:
        async with simulator() as provider, worker(dsn, provider.url) as run:
            lost = await run.event("database.lost")
            alive = await run.get("/healthz")
            unready = await run.get("/readyz")
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
            await run.event("database.back")
            await run.started()

            async def ready() -> bool:
                return (await run.get("/readyz"))[0] == 200

            await wait_for(ready, "readiness")
            connection = await asyncpg.connect(dsn)
            await add_service(connection)
            await add_message(connection)
            await until_statuses(connection, accepted=1)
            await connection.close()
            assert await run.stop() == 0
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()

    assert lost["level"] == "error"
    assert alive[0] == 200
    assert unready[0] == 503
    assert "the database is away" in unready[1]
    assert len(run.seen("database.lost")) == 1


async def test_stopped_while_it_waits_for_the_database() -> None:
    """A worker that has no database yet stops when it is told to."""
    dsn = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    async with worker(dsn, NOWHERE) as run:
        await run.event("database.lost")

        assert await run.stop() == 0

    assert run.errors == ""


async def test_embedded(data_dir: Path) -> None:
    """Without an address it starts a database of its own, migrated, and tells how to get in."""
    async with simulator() as provider:
        for accepted in (1, 2):
            async with worker(None, provider.url, data_dir=data_dir) as run:
                told = await run.event("database.embedded")
                await run.started()
                connection = await asyncpg.connect(told["psql"].split('"')[1])
                if accepted == 1:
                    await add_service(connection)
                await add_message(connection)
                await until_statuses(connection, accepted=accepted)
                await connection.close()
                assert await run.stop() == 0
            assert run.errors == ""
