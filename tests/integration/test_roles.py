"""deploy/roles.sql on the real database: what each role may, and what it may not."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest

from dispatcher.db import workers
from dispatcher.db.pool import Session
from tests.builders import add_message, add_messages, add_service
from tests.e2e.harness import free_port, simulator, until_statuses, wait_for, worker

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

ROOT = Path(__file__).parents[2]
ROLES_SQL = (ROOT / "deploy/roles.sql").read_text()
NAMES = count()

# Statements begin so; what is put together from pieces is in a constant of its own.
STATEMENT = re.compile(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE)\b")


@pytest.fixture
async def roles(connection: Connection) -> None:
    """The roles, with a service to send through."""
    await connection.execute(ROLES_SQL)
    await add_service(connection)


@asynccontextmanager
async def acting(database: str, role: str) -> AsyncIterator[Connection]:
    """A connection with the rights of a role and no others."""
    connection = await asyncpg.connect(database)
    try:
        await connection.execute(f"SET ROLE {role}")
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def user(connection: Connection, database: str, role: str) -> AsyncIterator[str]:
    """The connection string of a user who has been granted a role."""
    name = f"{role}_{(await connection.fetchval('SELECT current_database()'))}_{next(NAMES)}"
    await connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE {role}")
    try:
        yield database.replace("//postgres@", f"//{name}@")
    finally:
        await connection.execute(f"DROP ROLE {name}")


def statements(modules: set[str]) -> dict[str, str]:
    """The SQL of modules, by where it stands."""
    return {
        f"{module}.{name}": sql
        for module in sorted(modules)
        for name, sql in vars(import_module(module)).items()
        if isinstance(sql, str) and STATEMENT.match(sql)
    }


def loaded_with(*modules: str) -> set[str]:
    """The modules of `dispatcher.db` that a program loads with some modules."""
    code = f"import sys, {', '.join(modules)}; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in done.stdout.split() if name.startswith("dispatcher.db.")}


async def refused(connection: Connection, found: dict[str, str]) -> list[str]:
    """Which statements a connection may not run; those are left out that are only pieces."""
    names = []
    for name, sql in found.items():
        try:
            await connection.execute(f"EXPLAIN (GENERIC_PLAN) {sql}")
        except asyncpg.InsufficientPrivilegeError:
            names.append(name)
        except (asyncpg.UndefinedTableError, asyncpg.PostgresSyntaxError):
            continue
    return names


# ------------------------------------------------------------------------------------- producer


async def test_producer_inserts(database: str, roles: None, connection: Connection) -> None:
    """A producer inserts by INSERT and by COPY, learns the id, and leaves a known key alone."""
    async with acting(database, "dispatcher_producer") as producer:
        first = await producer.fetchval(
            "INSERT INTO outbox (service_id, msisdn, text, extended, priority, send_after,"
            " expires_at, dedup_key, batch) VALUES (42, '0881234567', 'a', false, 1, now(),"
            " now() + interval '1 hour', 'k', 'b') RETURNING id"
        )
        for conflict in (
            (
                "INSERT INTO outbox (service_id, msisdn, text, dedup_key)"
                " VALUES (42, '0881234567', 'a', 'k') ON CONFLICT DO NOTHING"
            ),
            (
                "INSERT INTO outbox (service_id, msisdn, text, dedup_key)"
                " VALUES (42, '0881234567', 'a', 'k')"
                " ON CONFLICT (service_id, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING"
            ),
        ):
            assert await producer.execute(conflict) == "INSERT 0 0"
        await producer.copy_records_to_table(
            "outbox", columns=["service_id", "msisdn", "text"], records=[(42, "0881234567", "c")]
        )

    rows = await connection.fetch("SELECT id, text, status FROM outbox ORDER BY id")
    assert [tuple(row)[1:] for row in rows] == [("a", "pending"), ("c", "pending")]
    assert rows[0]["id"] == first


async def test_producer_wakes_a_worker(database: str, roles: None, connection: Connection) -> None:
    """An insert of a producer wakes a worker that sleeps."""
    await connection.execute("INSERT INTO egress (name) VALUES ('default')")
    await connection.execute(
        "INSERT INTO worker (egress, host, pid, version, lease, lease_until, idle)"
        " VALUES ('default', 'h', 1, '0', '1 hour', now() + interval '1 hour', true)"
    )
    woken = asyncio.Event()
    await connection.add_listener("dispatcher", lambda *_: woken.set())
    async with acting(database, "dispatcher_producer") as producer:
        await producer.execute(
            "INSERT INTO outbox (service_id, msisdn, text) VALUES (42, '0881234567', 'a')"
        )

    async with asyncio.timeout(30):
        await woken.wait()


async def test_producer_cancels(database: str, roles: None, connection: Connection) -> None:
    """A producer cancels what waits, by id or by batch, and the time of it is noted."""
    first = await add_message(connection)
    await add_messages(connection, 2, batch="may")
    async with acting(database, "dispatcher_producer") as producer:
        for cancel, changed in (
            ("UPDATE outbox SET status = 'cancelled' WHERE id = $1 AND status = 'pending'", 1),
            (
                (
                    "UPDATE outbox SET status = 'cancelled'"
                    " WHERE batch = 'may' AND id <> $1 AND status = 'pending'"
                ),
                2,
            ),
            ("UPDATE outbox SET status = 'cancelled' WHERE id >= $1 AND status = 'pending'", 0),
        ):
            assert await producer.execute(cancel, first) == f"UPDATE {changed}"

    rows = await connection.fetch("SELECT status, status_at > created_at AS noted FROM outbox")
    assert [tuple(row) for row in rows] == [("cancelled", True)] * 3


async def test_producer_is_too_late(database: str, roles: None, connection: Connection) -> None:
    """A cancellation that waits for a claim changes nothing once the message is claimed."""
    first = await add_message(connection)
    async with acting(database, "dispatcher_producer") as producer:
        async with connection.transaction():
            await connection.execute(
                "UPDATE outbox SET status = 'sending', worker_id = 1, claimed_at = now(),"
                " status_at = now() WHERE id = $1",
                first,
            )
            cancelling = asyncio.create_task(
                producer.execute(
                    "UPDATE outbox SET status = 'cancelled' WHERE id = $1 AND status = 'pending'",
                    first,
                )
            )

            async def waits() -> bool:
                found: bool = await connection.fetchval(
                    "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
                    " AND pid <> pg_backend_pid()"
                    " AND pid IN (SELECT pid FROM pg_stat_activity WHERE datname ="
                    " current_database())"
                )
                return found

            await wait_for(waits, "the cancellation waits")
        assert await cancelling == "UPDATE 0"


STATUSES = ("accepted", "enroute", "delivered", "undeliverable", "rejected", "expired", "unknown")


@pytest.mark.parametrize("before", [*STATUSES, "sending", "cancelled"])
async def test_producer_cancels_nothing_else(
    before: str, database: str, roles: None, connection: Connection
) -> None:
    """A producer cannot cancel what does not wait, nor make anything of a status but cancelled."""
    held = {"worker_id": 1, "claimed_at": await connection.fetchval("SELECT now()")}
    first = await add_message(connection, status=before, **held)
    waiting = await add_message(connection)
    async with acting(database, "dispatcher_producer") as producer:
        for number, after in ((first, "cancelled"), (first, "pending"), (waiting, before)):
            if (number, after) == (waiting, "cancelled"):
                continue
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="may not become"):
                await producer.execute("UPDATE outbox SET status = $1 WHERE id = $2", after, number)

    rows = await connection.fetch("SELECT status FROM outbox ORDER BY id")
    assert [row["status"] for row in rows] == [before, "pending"]


async def test_producer_cannot_fool_the_trigger(
    database: str, roles: None, connection: Connection
) -> None:
    """Functions of a producer's own, first in its search path, do not lift the limits."""
    first = await add_message(connection, status="rejected")
    await connection.execute("CREATE SCHEMA evil AUTHORIZATION dispatcher_producer")
    async with acting(database, "dispatcher_producer") as producer:
        await producer.execute(
            "CREATE FUNCTION evil.has_column_privilege(oid, text, text) RETURNS boolean"
            " LANGUAGE sql AS 'SELECT true'"
        )
        await producer.execute("SET search_path = evil, pg_catalog, public")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await producer.execute("UPDATE outbox SET status = 'pending' WHERE id = $1", first)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT text FROM outbox",
        "SELECT msisdn FROM outbox",
        "SELECT * FROM outbox",
        "SELECT reply, error, provider_id FROM outbox",
        "UPDATE outbox SET text = 'b'",
        "UPDATE outbox SET status = 'cancelled', status_at = now()",
        "UPDATE outbox SET send_after = now()",
        "UPDATE outbox SET claim_no = 0",
        "DELETE FROM outbox",
        "TRUNCATE outbox",
        "INSERT INTO outbox (service_id, msisdn, text, status) VALUES (42, '1', 'a', 'accepted')",
        "INSERT INTO outbox (service_id, msisdn, text, attempts) VALUES (42, '1', 'a', 1)",
        "INSERT INTO outbox (id, service_id, msisdn, text) VALUES (99, 42, '1', 'a')",
        "ALTER TABLE outbox DISABLE TRIGGER ALL",
        "DROP TRIGGER outbox_only_cancel ON outbox",
        "SET session_replication_role = replica",
        "SELECT host FROM worker",
        "UPDATE worker SET idle = false",
        "SELECT FROM service",
        "SELECT FROM attempt",
        "SELECT FROM delivery_report",
        "UPDATE quota_usage SET used = 0",
        "UPDATE egress SET banned_until = NULL",
        "INSERT INTO service (service_id, user_id) VALUES (1, 1)",
        "CREATE TABLE mine (id integer)",
    ],
)
async def test_producer_may_nothing_more(sql: str, database: str, roles: None) -> None:
    """A producer reads no text and no number, and writes nothing else."""
    async with acting(database, "dispatcher_producer") as producer:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await producer.execute(sql)


# --------------------------------------------------------------------------------------- worker


async def test_worker_may_run_its_statements(
    database: str, roles: None, connection: Connection
) -> None:
    """A worker may run every statement that `dispatcher run` can run."""
    found = {
        name: sql
        for name, sql in statements(loaded_with("dispatcher.app")).items()
        # Off unless DISPATCHER_PRUNE_DAYS is set; roles.sql names the right that it takes.
        if not name.startswith("dispatcher.db.prune.")
    }
    assert {"dispatcher.db.outbox._CLAIM", "dispatcher.db.reports._RECEIVE"} <= found.keys()
    async with acting(database, "dispatcher_worker") as acting_worker:
        assert await refused(acting_worker, found) == []


async def test_worker_knows_its_database(
    database: str, roles: None, connection: Connection
) -> None:
    """A worker knows its database as the owner does; on a server that hides it, it does without."""
    async with (
        user(connection, database, "dispatcher_worker") as dsn,
        Session(dsn, name="test", timeout=30) as session,
        Session(database, name="test", timeout=30) as owner,
    ):
        known = await workers.database(session)
        owners = await workers.database(owner)
        await connection.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
        hidden = await workers.database(session)

    assert known == owners != ""
    assert hidden == ""


async def test_a_worker_works(database: str, roles: None, connection: Connection) -> None:
    """A real worker with the rights of the role sends, waits for a limit and takes reports."""
    await add_service(connection, 43, day_limit=1)
    await add_service(connection, 44)
    await add_messages(connection, 3)
    await add_messages(connection, 2, service_id=43)
    await add_message(connection, service_id=44)
    port = free_port()
    services = [{"id": 42, "delay": 0.001}, {"id": 43}, {"id": 44, "disabled": True}]
    reports = {"url": f"http://127.0.0.1:{port}/dlr/t", "enroute": [0, 0], "final": [0.1, 0.1]}
    async with (
        user(connection, database, "dispatcher_worker") as dsn,
        simulator(services=services, reports=reports) as provider,
        worker(dsn, provider.url, http_port=port, dlr_token="t") as running,
    ):
        await until_statuses(connection, delivered=4, pending=2)
        await running.event("service.blocked", service_id=44)
        assert await running.stop() == 0


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO outbox (service_id, msisdn, text) VALUES (42, '1', 'a')",
        "UPDATE outbox SET text = 'b'",
        "UPDATE outbox SET msisdn = '1'",
        "DELETE FROM outbox",
        "UPDATE service SET day_limit = NULL",
        "UPDATE service SET paused = false",
        "DELETE FROM attempt",
        "UPDATE alembic_version SET version_num = ''",
        "DROP TABLE outbox",
    ],
)
async def test_worker_may_nothing_more(sql: str, database: str, roles: None) -> None:
    """A worker changes nothing that users and operators wrote."""
    async with acting(database, "dispatcher_worker") as acting_worker:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await acting_worker.execute(sql)


# --------------------------------------------------------------------------------------- reader


async def test_reader_reads(database: str, roles: None, connection: Connection) -> None:
    """A reader may run every statement of `status`, `why` and `export`, and the commands work."""
    number = await add_message(connection)
    found = statements({f"dispatcher.db.{name}" for name in ("overview", "story", "export")})
    assert len(found) > 8
    async with acting(database, "dispatcher_reader") as reader:
        assert await refused(reader, found) == []

    async with user(connection, database, "dispatcher_reader") as dsn:
        for command in (["status", "--json"], ["why", str(number), "--json"]):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dispatcher", *command),
                cwd=ROOT,
                env={"DATABASE_URL": dsn, "PATH": ""},
                stdout=subprocess.PIPE,
            )
            out, _ = await process.communicate()
            assert process.returncode == 0
            assert json.loads(out)


async def test_reader_writes_nothing(database: str, roles: None, connection: Connection) -> None:
    """A reader may read every table and change none."""
    rows = await connection.fetch(
        "SELECT c.oid::regclass::text AS name,"
        " has_table_privilege('dispatcher_reader', c.oid, 'SELECT') AS reads,"
        " has_table_privilege('dispatcher_reader', c.oid, 'DELETE, TRUNCATE, TRIGGER')"
        " OR has_any_column_privilege('dispatcher_reader', c.oid, 'INSERT, UPDATE, REFERENCES')"
        " AS writes"
        " FROM pg_class c WHERE c.relkind IN ('r', 'p', 'v', 'm')"
        " AND c.relnamespace = 'public'::regnamespace"
    )
    assert len(rows) >= 10
    assert [tuple(row) for row in rows] == [(row["name"], True, False) for row in rows]


async def test_may_be_run_again(database: str, roles: None, connection: Connection) -> None:
    """Run again it changes nothing, and takes back what was granted beyond it."""
    held = "SELECT relname, relacl::text FROM pg_class WHERE relname = 'outbox'"
    before = await connection.fetch(held)
    await connection.execute("GRANT DELETE, UPDATE (text) ON outbox TO dispatcher_producer")

    await connection.execute(ROLES_SQL)

    assert await connection.fetch(held) == before
    async with acting(database, "dispatcher_producer") as producer:
        for sql in ("DELETE FROM outbox", "UPDATE outbox SET text = ''"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await producer.execute(sql)
