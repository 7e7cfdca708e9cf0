import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from dispatcher.db import migrations, schema
from dispatcher.db.pool import Session
from dispatcher.embedded import EmbeddedPostgres
from tests.conftest import database_dsn
from tests.integration.commands.conftest import Command, Outcome
from tests.integration.peers import Connection, wait_for

REVISION = schema.newest()


@pytest.fixture
async def empty(
    postgres: EmbeddedPostgres, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """Sets an empty database."""
    name = f"empty_{os.getpid()}"
    server = await asyncpg.connect(postgres.dsn)
    await server.execute(f"CREATE DATABASE {name}")
    dsn = database_dsn(postgres.dsn, name)
    monkeypatch.setenv("DATABASE_URL", dsn)
    yield dsn
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await server.close()


async def test_from_nothing(command: Command, empty: str) -> None:
    """An empty database is brought to the newest revision, and a second time left alone."""
    behind = await command("migrate", "--check")
    first = await command("migrate")
    again = await command("migrate")
    current = await command("migrate", "--check")

    assert (behind.code, behind.out) == (1, "")
    assert behind.err == (
        f"The database is at revision none and this program needs {REVISION}; run 'dispatcher "
        "migrate'.\n"
    )
    assert first == Outcome(0, f"The database went from revision none to {REVISION}.\n", "")
    assert again == Outcome(0, f"The database was at revision {REVISION} already.\n", "")
    assert current == Outcome(
        0, f"The database is at revision {REVISION}, as this program needs it.\n", ""
    )


async def test_four_at_once(process: Command, empty: str) -> None:
    """Four that start at once take turns: one migrates and all end well."""
    done = await asyncio.gather(*(process("migrate", "--json") for _ in range(4)))

    assert [outcome.code for outcome in done] == [0] * 4
    assert sorted(outcome.json["migrated"] for outcome in done) == [False, False, False, True]


async def test_turns(empty: str) -> None:
    """Who migrates looks at nothing before its turn has come, so two that wait both end well."""
    other = await asyncpg.connect(empty)
    await other.execute("SELECT pg_advisory_lock($1)", migrations.LOCK)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(migrations.upgrade(empty)) for _ in range(2)]

        async def wait() -> bool:
            waiting = await other.fetchval(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event = 'advisory'"
            )
            return waiting == 2 or any(task.done() for task in tasks)

        await wait_for(wait, "two that wait for their turn")
        before = await other.fetchval("SELECT to_regclass('alembic_version')")
        await other.close()

    assert before is None
    assert {task.result().found for task in tasks} == {None, REVISION}


@pytest.mark.parametrize("arguments", [("migrate",), ("migrate", "--check"), ("service", "list")])
async def test_ahead(command: Command, connection: Connection, arguments: tuple[str, ...]) -> None:
    """A database of a newer version is left alone, with one sentence."""
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")

    done = await command(*arguments)

    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "The database is at revision 9999, which this program does not know; run a newer "
        "dispatcher.\n"
    )


async def test_behind(command: Command, empty: str) -> None:
    """A command on a database that is behind says what to run, and changes nothing."""
    done = await command("service", "add", 42, "--user-id", 7)

    assert (done.code, done.out) == (1, "")
    assert done.err.endswith("run 'dispatcher migrate'.\n")
    assert (await command("migrate", "--check", "--json")).json == {
        "found": None,
        "wanted": REVISION,
        "current": False,
        "migrated": False,
    }


async def test_sql(command: Command, empty: str) -> None:
    """The printed SQL, run by hand, makes what the command makes."""
    sql = (await command("migrate", "--sql")).out
    connection = await asyncpg.connect(empty)
    await connection.execute(sql)
    await connection.close()

    assert (await command("migrate", "--check")).code == 0
    assert (await command("migrate", "--sql", "--json")).json == {"sql": sql}


async def test_sql_needs_no_database(offline: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SQL is printed wherever the database is."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@127.0.0.1:1/x")

    assert "CREATE TABLE outbox" in (await offline("migrate", "--sql")).out


async def test_one_thing_at_a_time(offline: Command) -> None:
    """To print and to check are two things."""
    done = await offline("migrate", "--sql", "--check")

    assert (done.code, done.err) == (2, "Use --sql or --check, not both.\n")


async def test_quick_look_agrees(database: str) -> None:
    """The newest revision that is told without Alembic is the one that Alembic knows."""
    async with Session(database, name="test", timeout=30) as session:
        assert (await schema.inspect(session)).wanted == REVISION
        assert await schema.complaint(session) is None
    assert isinstance(migrations.render(), str)


async def test_embedded(process: Command, data_dir: Path) -> None:
    """Without DATABASE_URL a database of our own is made, migrated and kept."""
    alone = {"DATABASE_URL": "", "DISPATCHER_DATA_DIR": str(data_dir)}

    checked = await process("check", "--json", DISPATCHER_PROVIDER_URL="http://0.0.0.0/", **alone)
    current = await process("migrate", "--check", "--json", **alone)

    findings = {finding["name"]: finding for finding in checked.json["checks"]}
    assert findings["schema"]["ok"]
    assert findings["database"]["detail"].endswith("(embedded)")
    assert (current.code, current.json["found"]) == (0, REVISION)


@pytest.mark.parametrize(
    ("module", "commands"),
    [("alembic", ("service", "list")), ("asyncpg", ("--help",))],
)
async def test_start_is_quick(
    no_settings: Path, database: str, module: str, commands: tuple[str, ...]
) -> None:
    """A command loads nothing slow that it does not need."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "importtime", "-m", "dispatcher", *commands),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "DATABASE_URL": database,
        },
    )
    _, loaded = await running.communicate()

    assert running.returncode == 0
    assert b"typer" in loaded
    assert module not in {line.split("|")[-1].strip() for line in loaded.decode().splitlines()}
