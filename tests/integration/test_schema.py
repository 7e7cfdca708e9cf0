"""The schema on a real PostgreSQL: what it refuses, what its triggers do, how it comes about."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from dispatcher.db import migrations, workers
from dispatcher.db.pool import DatabaseLost
from dispatcher.domain.message import Status
from dispatcher.embedded import EmbeddedPostgres
from tests.builders import NUMBER, SERVICE, TEXT, add_message, add_messages, add_service
from tests.conftest import TEMPLATE, database_dsn
from tests.integration.peers import Connection, message, peer

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def shared_database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """One database for all tests that leave nothing behind."""
    name = f"shared_{os.getpid()}"

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(run(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    yield database_dsn(postgres.dsn, name)
    asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def undone(shared_database: str) -> AsyncIterator[Connection]:
    """A connection whose work is taken back."""
    connection = await asyncpg.connect(shared_database)
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


# ------------------------------------------------------------------ what users rely on

# From the documentation of the tables: column, type, default, whether it may be null.
SERVICE_COLUMNS = {
    "service_id": ("bigint", None, False),
    "user_id": ("bigint", None, False),
    "name": ("text", "''::text", False),
    "day_limit": ("integer", None, True),
    "week_limit": ("integer", None, True),
    "month_limit": ("integer", None, True),
    "min_delay": ("interval", "'00:00:00'::interval", False),
    "timezone": ("text", "'Europe/Sofia'::text", False),
    "patterns": ("text[]", None, True),
    "on_unknown": ("text", "'hold'::text", False),
    "paused": ("boolean", "false", False),
    "blocked_until": ("timestamp with time zone", None, True),
    "blocked_reason": ("text", None, True),
}
OUTBOX_COLUMNS = {
    "id": ("bigint", None, False),
    "service_id": ("bigint", None, False),
    "msisdn": ("text", None, False),
    "text": ("text", None, False),
    "extended": ("boolean", "true", False),
    "priority": ("smallint", "0", False),
    "send_after": ("timestamp with time zone", "now()", False),
    "retry_at": ("timestamp with time zone", None, True),
    "expires_at": ("timestamp with time zone", None, True),
    "dedup_key": ("text", None, True),
    "batch": ("text", None, True),
    "created_at": ("timestamp with time zone", "now()", False),
    "status": ("text", "'pending'::text", False),
    "status_at": ("timestamp with time zone", "now()", False),
    "attempts": ("integer", "0", False),
    "reply": ("text", None, True),
    "provider_id": ("text", None, True),
    "error": ("text", None, True),
}
OTHER_COLUMNS = {
    "quota_usage": {"service_id", "period", "window_start", "used"},
    "egress": {"name", "banned_until", "ban_episode", "ill_until"},
    "egress_service": {"egress", "service_id", "blocked_until", "blocked_reason"},
    "delivery_report": {"id", "provider_id", "status", "received_at", "message_id", "params"},
}
COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid),
    NOT a.attnotnull
FROM pg_attribute a
LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""


@pytest.mark.parametrize(
    ("table", "documented"), [("service", SERVICE_COLUMNS), ("outbox", OUTBOX_COLUMNS)]
)
async def test_columns_of_users(
    undone: Connection, table: str, documented: dict[str, tuple[str, str | None, bool]]
) -> None:
    """Each documented column has its type and its default, and no other one must be given."""
    found = {name: tuple(rest) for name, *rest in await undone.fetch(COLUMNS, table)}

    assert {name: found[name] for name in documented} == documented
    assert all(
        default or null for name, (_, default, null) in found.items() if name not in documented
    )


@pytest.mark.parametrize("table", OTHER_COLUMNS)
async def test_columns_of_readers(undone: Connection, table: str) -> None:
    """What readers rely on is there."""
    found = {row["attname"] for row in await undone.fetch(COLUMNS, table)}

    assert found >= OTHER_COLUMNS[table]


async def test_three_columns_are_enough(undone: Connection) -> None:
    """A service needs its two numbers, and a message its service, its number and its text."""
    await undone.execute("INSERT INTO service (service_id, user_id) VALUES (42, 7)")
    await undone.execute(
        "INSERT INTO outbox (service_id, msisdn, text) VALUES (42, $1, $2)", NUMBER, TEXT
    )

    row = await undone.fetchrow("SELECT * FROM outbox")
    assert row is not None
    assert (row["status"], row["extended"], row["attempts"]) == ("pending", True, 0)
    assert row["send_after"] == row["created_at"] == row["status_at"]


@pytest.mark.parametrize(
    ("msisdn", "text"),
    [
        ("", ""),
        ("hello", "x" * 100_000),
        ("\n", "🙂\n\x01"),
        ("3" * 5000, "\U0010ffff"),
        ("'; DROP TABLE outbox; --", "%s {} \\"),
    ],
)
async def test_bad_message_breaks_no_transaction(
    undone: Connection, msisdn: str, text: str
) -> None:
    """An insert never fails for what a number or a text is, and keeps it as it is."""
    await add_service(undone)

    row = await message(undone, await add_message(undone, msisdn=msisdn, text=text))

    assert (row["msisdn"], row["text"]) == (msisdn, text)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "columns",
    [
        {"service_id": 43},
        {"status": "sent"},
        {"status": "PENDING"},
        {"status": "sending"},
        {"status": "sending", "worker_id": 1},
        {"status": "sending", "claimed_at": NOW},
        {"attempts": -1},
        {"reply": "x" * 201},
        {"provider_id": "abc"},
        {"status": "unknown", "provider_id": "abc"},
        {"status": "rejected", "provider_id": "abc"},
    ],
)
async def test_impossible_message(undone: Connection, columns: dict[str, object]) -> None:
    """A message in a state that cannot be is refused."""
    await add_service(undone)

    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await add_message(undone, **columns)


@pytest.mark.parametrize("status", Status)
async def test_every_status(undone: Connection, status: Status) -> None:
    """Each documented status can be stored."""
    await add_service(undone)
    held: dict[str, object] = {"worker_id": 1, "claimed_at": NOW}

    assert await add_message(
        undone, status=status.value, **held if status is Status.SENDING else {}
    )


@pytest.mark.parametrize(
    "columns",
    [
        {"day_limit": -1},
        {"week_limit": -1},
        {"month_limit": -1},
        {"min_delay": timedelta(seconds=-1)},
        {"on_unknown": "forget"},
        {"blocked_until": NOW},
        {"blocked_reason": "INVALID_INPUT"},
    ],
)
async def test_impossible_service(undone: Connection, columns: dict[str, Any]) -> None:
    """A service that cannot be is refused."""
    with pytest.raises(asyncpg.CheckViolationError):
        await add_service(undone, **columns)


async def test_same_key_once_in_a_service(connection: Connection) -> None:
    """A `dedup_key` is there once in its service, and any number of messages have none."""
    await add_service(connection)
    await add_service(connection, SERVICE + 1)
    await add_message(connection, dedup_key="invoice-1")
    await add_message(connection, dedup_key="invoice-1", service_id=SERVICE + 1)
    await add_message(connection, dedup_key="")
    await add_messages(connection, 2)

    with pytest.raises(asyncpg.UniqueViolationError):
        await add_message(connection, dedup_key="invoice-1", text="another")
    skipped = await connection.execute(
        "INSERT INTO outbox (service_id, msisdn, text, dedup_key) "
        "VALUES (42, '359881234567', 'x', 'invoice-1') ON CONFLICT DO NOTHING"
    )
    assert skipped == "INSERT 0 0"


# ------------------------------------------------------------------ time zones and patterns


@pytest.mark.parametrize(
    "zone", ["UTC", "Europe/Sofia", "America/St_Johns", "EET", "<X>+03:30", "EST5EDT"]
)
async def test_zone_that_postgresql_knows(undone: Connection, zone: str) -> None:
    """Any time zone that PostgreSQL takes is taken."""
    await add_service(undone, timezone=zone)


@pytest.mark.parametrize("zone", ["", "Europe/Sofja", "Sofia", "'; SELECT 1; --"])
async def test_zone_that_it_does_not(connection: Connection, zone: str) -> None:
    """A time zone that PostgreSQL does not know is refused by name when it is written."""
    with pytest.raises(asyncpg.InvalidParameterValueError) as caught:
        await add_service(connection, timezone=zone)
    assert caught.value.message == f'PostgreSQL does not know the time zone "{zone}".'
    assert "pg_timezone_names" in (caught.value.hint or "")

    await add_service(connection)
    with pytest.raises(asyncpg.InvalidParameterValueError):
        await connection.execute("UPDATE service SET timezone = $1", zone)


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (["ok", "("], 'The pattern "(" is not a regular expression'),
        (["a{2,1}"], 'The pattern "a{2,1}" is not a regular expression'),
        (["[[:lettr:]]"], "is not a regular expression"),
        (["*a"], 'The pattern "*a" is not a regular expression'),
        (["(?i"], 'The pattern "(?i" is not a regular expression'),
        (["***=a"], 'The pattern "***=a" starts with an unsupported option.'),
        (["(?q)a"], 'The pattern "(?q)a" starts with an unsupported option.'),
        (["(?e)a"], 'The pattern "(?e)a" starts with an unsupported option.'),
        (["(?x)a b"], 'The pattern "(?x)a b" starts with an unsupported option.'),
        (["(?ix)a b"], 'The pattern "(?ix)a b" starts with an unsupported option.'),
        (["(?xi)a b"], 'The pattern "(?xi)a b" starts with an unsupported option.'),
        (["a(?i)b"], 'The pattern "a(?i)b" is not a regular expression'),
        (["a)|(b"], 'The pattern "a)|(b" is not a regular expression'),
        (["a", None], "A pattern is null."),
    ],
)
async def test_pattern_that_is_none(undone: Connection, patterns: list[str], sentence: str) -> None:
    """A pattern that could only fail in the middle of a claim is refused when it is written."""
    with pytest.raises(asyncpg.PostgresError) as caught:
        await add_service(undone, patterns=patterns)

    assert sentence in (caught.value.message or "")
    assert caught.value.hint


MATCHES: list[tuple[str, list[str], list[str]]] = [
    ("abc", ["abc"], ["xabc", "abcx", "ab", "ABC", "abc\n", ""]),
    ("a|b", ["a", "b"], ["ab", "ax", "xb"]),
    ("^a$", ["a"], ["aa", "xa"]),
    ("Code [0-9]{4}", ["Code 1234"], ["Code 12345", "My Code 1234"]),
    (".*", ["", "anything", "a\nb"], []),
    ("(?i)abc", ["abc", "ABC", "aBc"], ["abcd", "xABC"]),
    ("(?i)a|b", ["A", "B"], ["Ax", "xB"]),
    ("(?n)a.*", ["ab"], ["a\nb"]),
    ("(?p)a.*", ["ab"], ["a\nb"]),
    ("(?w)^a$", ["a"], ["a\nb", "b\na"]),
    ("(?s)a.b", ["a\nb"], ["a\nbc"]),
    ("(?:i)a", ["ia"], ["a", "A"]),
    ("(?:code|pin) .*", ["code 1", "pin 2"], ["code", "a pin 2"]),
    ("(?:a)(?:b)", ["ab"], ["abb"]),
    ("(?!a)[a-z]+", ["b"], ["a", "ab"]),
    ("(?=a)abc", ["abc"], ["bc"]),
    (r"\d+", ["12"], ["12a", "a12"]),
    (r"(a)\1", ["aa"], ["a", "aaa", "ab"]),
    ("a{2}", ["aa"], ["a", "aaa"]),
    (r"Здравей, \w+!", ["Здравей, Иване!"], ["Здравей!"]),
    ("", [""], ["a"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), MATCHES)
async def test_pattern_matches_the_whole_text(
    undone: Connection, pattern: str, good: list[str], bad: list[str]
) -> None:
    """A pattern must match a text from its first character to its last, whatever it is made of."""
    await add_service(undone, patterns=[pattern])

    found = await undone.fetch(
        "SELECT t, t ~ dispatcher_whole_pattern($1) AS matches FROM unnest($2::text[]) AS t",
        pattern,
        good + bad,
    )

    assert {row["t"]: row["matches"] for row in found} == {
        **dict.fromkeys(good, True),
        **dict.fromkeys(bad, False),
    }


# ------------------------------------------------------------------ triggers


async def test_cancel_sets_the_time(connection: Connection) -> None:
    """A user's plain UPDATE of the status moves `status_at`, and any other UPDATE does not."""
    await add_service(connection)
    first = await add_message(connection)
    before = (await message(connection, first))["status_at"]

    await connection.execute("UPDATE outbox SET text = 'other', status = 'pending'")
    assert (await message(connection, first))["status_at"] == before
    await connection.execute(
        "UPDATE outbox SET status = 'cancelled' WHERE id = $1 AND status = 'pending'", first
    )
    assert (await message(connection, first))["status_at"] > before


async def test_time_that_is_given_stays(connection: Connection) -> None:
    """A change of the status with a `status_at` of its own keeps that."""
    await add_service(connection)
    first = await add_message(connection)

    await connection.execute("UPDATE outbox SET status = 'accepted', status_at = $1", NOW)

    assert (await message(connection, first))["status_at"] == NOW


@pytest.fixture
async def heard(database: str) -> AsyncIterator[asyncio.Queue[str]]:
    """What is notified on the dispatcher's channel."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    listener = await asyncpg.connect(database)
    await listener.add_listener("dispatcher", lambda *told: queue.put_nowait(str(told[-1])))
    yield queue
    await listener.close()


async def test_insert_wakes_an_idle_worker(
    database: str, connection: Connection, heard: asyncio.Queue[str]
) -> None:
    """One INSERT of any number of rows wakes once, and only while some worker sleeps."""
    await add_service(connection)
    insert = (
        "INSERT INTO outbox (service_id, msisdn, text) "
        "SELECT 42, '359881234567', 'x' FROM generate_series(1, $1::integer)"
    )
    async with peer(database) as worker, peer(database) as other:
        await connection.execute(insert, 3)
        await workers.set_idle(worker.session, worker.worker_id, idle=True)
        await connection.execute(insert, 5)
        await workers.set_idle(worker.session, worker.worker_id, idle=False)
        await connection.execute(insert, 3)
        await workers.set_idle(other.session, other.worker_id, idle=True)
        await connection.execute(
            "UPDATE worker SET lease_until = now() WHERE id = $1", other.worker_id
        )
        await connection.execute(insert, 3)
        await connection.execute("NOTIFY dispatcher, 'end'")

    async with asyncio.timeout(10):
        told = [await heard.get(), await heard.get()]
    assert told == ["outbox", "end"]


async def test_insert_of_another_search_path(
    database: str, connection: Connection, heard: asyncio.Queue[str]
) -> None:
    """Who may only insert, and has tables of the same names first in its path, wakes as well."""
    await add_service(connection)
    role = f"shop_{database.partition('?')[0].rpartition('/')[2]}"
    await connection.execute(
        f"""
        CREATE ROLE {role};
        GRANT INSERT ON public.outbox, public.service TO {role};
        CREATE SCHEMA shop AUTHORIZATION {role};
        SET ROLE {role};
        SET search_path = shop;
        CREATE TABLE worker (id bigint);
        """
    )
    try:
        async with peer(database) as worker:
            await workers.set_idle(worker.session, worker.worker_id, idle=True)
            await connection.execute(
                "INSERT INTO public.service (service_id, user_id, patterns) VALUES (43, 7, '{a+}')"
            )
            await connection.execute(
                "INSERT INTO public.outbox (service_id, msisdn, text) "
                "VALUES (42, '359881234567', 'x')"
            )
            async with asyncio.timeout(10):
                assert await heard.get() == "outbox"
    finally:
        await connection.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


# ------------------------------------------------------------------ how it comes about


@pytest.fixture
async def bare(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The connection string of an empty database."""
    admin = await asyncpg.connect(postgres.dsn)
    name = f"bare_{id(admin)}"
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    yield database_dsn(postgres.dsn, name)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def test_four_migrations_at_once(bare: str) -> None:
    """Those who migrate at once take turns: one does it, and the others find it done."""
    found = await asyncio.gather(*(migrations.upgrade(bare) for _ in range(4)))

    assert sorted(schema.current for schema in found) == [False, True, True, True]
    again = await migrations.upgrade(bare)
    assert again.current


async def test_printed_sql_is_the_schema(bare: str, connection: Connection) -> None:
    """What `migrate --sql` prints makes, run by hand, the very same tables."""
    everything = """
        SELECT table_name, column_name, data_type, column_default FROM information_schema.columns
        WHERE table_schema = 'public' ORDER BY 1, 2
    """
    by_hand = await asyncpg.connect(bare)
    try:
        await by_hand.execute(migrations.render())
        assert await by_hand.fetch(everything) == await connection.fetch(everything)
        assert (await migrations.inspect(by_hand)).current
    finally:
        await by_hand.close()


async def test_behind(bare: str) -> None:
    """A database without the schema is behind, and the sentence says what to run."""
    connection = await asyncpg.connect(bare)
    try:
        schema = await migrations.inspect(connection)
    finally:
        await connection.close()

    assert (schema.found, schema.current, schema.known) == (None, False, True)
    assert re.fullmatch(
        r"The database is at revision none and this program needs \d{4}; "
        r"run 'dispatcher migrate'\.",
        schema.complaint,
    )


async def test_ahead(database: str, connection: Connection) -> None:
    """A database from the future is left alone, and the sentence says what to run."""
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(migrations.SchemaAhead) as caught:
        await migrations.upgrade(database)

    assert str(caught.value) == (
        "The database is at revision 9999, which this program does not know; "
        "run a newer dispatcher."
    )


async def test_nothing_to_migrate() -> None:
    """A migration without a database says so as every other statement does."""
    with pytest.raises(DatabaseLost):
        await migrations.upgrade("postgresql://nobody@127.0.0.1:1/nothing")
