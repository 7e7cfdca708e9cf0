"""Rows as tests need them: only what matters to a test is said in it."""

import asyncpg

SERVICE = 42
NUMBER = "359881234567"
TEXT = "Your invoice is ready"


async def add_service(
    connection: "asyncpg.Connection[asyncpg.Record]",
    service_id: int = SERVICE,
    **columns: object,
) -> int:
    """Inserts a service, with defaults but for the columns given; returns its id."""
    row = {"service_id": service_id, "user_id": 7} | columns
    await _insert(connection, "service", "service_id", [row])
    return service_id


async def add_message(connection: "asyncpg.Connection[asyncpg.Record]", **columns: object) -> int:
    """Inserts a message, with defaults but for the columns given; returns its id."""
    (message_id,) = await add_messages(connection, 1, **columns)
    return message_id


async def add_messages(
    connection: "asyncpg.Connection[asyncpg.Record]", count: int, **columns: object
) -> list[int]:
    """Inserts messages that differ in their numbers only; returns their ids, in order."""
    rows = [
        {"service_id": SERVICE, "msisdn": str(int(NUMBER) + index), "text": TEXT} | columns
        for index in range(count)
    ]
    return await _insert(connection, "outbox", "id", rows)


async def _insert(
    connection: "asyncpg.Connection[asyncpg.Record]",
    table: str,
    key: str,
    rows: list[dict[str, object]],
) -> list[int]:
    names = list(rows[0])
    places = ", ".join(f"${number}" for number, _ in enumerate(names, start=1))
    inserted = await connection.fetchmany(
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places}) RETURNING {key}",  # noqa: S608 - names from the tests themselves
        [list(row.values()) for row in rows],
    )
    return [row[key] for row in inserted]
