"""The dispatcher itself, as `dispatcher run` starts it, with everything on."""

from __future__ import annotations

import asyncpg

from bench.contenders.task import SERVICE, USER, Task, message

LABEL = "dispatcher"
SETTINGS = (
    "dispatcher run with its defaults: logs at info to a file, quotas, wire guards, attempts, "
    "metrics, leases"
)
SHARE = 1.0
RECORDED = "SELECT count(*) FROM outbox WHERE status = 'accepted'"

_INSERT = "INSERT INTO outbox (service_id, msisdn, text) VALUES ($1, $2, $3)"


async def prepare(task: Task) -> None:
    """Leave the messages waiting, in a database that is migrated."""
    connection = await asyncpg.connect(task.dsn)
    await connection.execute(
        "INSERT INTO service (service_id, user_id) VALUES ($1, $2)", SERVICE, USER
    )
    await connection.copy_records_to_table(
        "outbox",
        columns=["service_id", "msisdn", "text"],
        records=((SERVICE, *message) for message in task.messages),
    )
    await connection.execute("VACUUM ANALYZE outbox")
    await connection.close()


async def insert(connection: asyncpg.Connection[asyncpg.Record], index: int) -> None:
    """Add one message."""
    await connection.execute(_INSERT, SERVICE, *message(index))
