"""A loop as one writes it by hand: lock a hundred rows, send them together, update each."""

from __future__ import annotations

import asyncio
import signal

import aiohttp
import asyncpg

from bench.contenders.task import CONCURRENCY, Task, message

LABEL = "hand-written loop"
SETTINGS = (
    "SELECT ... FOR UPDATE SKIP LOCKED LIMIT 100, gather, an UPDATE each in the same transaction; "
    "asyncpg, uvloop; killed at the wrong moment it sends a hundred again"
)
SHARE = 0.6
RECORDED = "SELECT count(*) FROM message WHERE status = 'sent'"

_TABLES = """
CREATE TABLE message (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    number text NOT NULL,
    text   text NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    reply  text
);
CREATE INDEX message_pending ON message (id) WHERE status = 'pending';
"""

_TAKE = """
SELECT id, number, text
FROM message
WHERE status = 'pending'
ORDER BY id
LIMIT $1
FOR UPDATE SKIP LOCKED
"""

_KEEP = "UPDATE message SET status = 'sent', reply = $2 WHERE id = $1"


async def prepare(task: Task) -> None:
    """Leave the messages waiting."""
    connection = await asyncpg.connect(task.dsn)
    await connection.execute(_TABLES)
    await connection.copy_records_to_table(
        "message", columns=["number", "text"], records=map(tuple, task.messages)
    )
    await connection.execute("VACUUM ANALYZE message")
    await connection.close()


async def run(task: Task) -> None:
    """Send what waits, until told to stop."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    connection = await asyncpg.connect(task.dsn)
    async with aiohttp.ClientSession() as session:

        async def send(row: asyncpg.Record) -> str:
            parameters = message(0)._replace(number=row["number"], text=row["text"]).parameters
            async with session.get(task.url, params=parameters) as response:
                return await response.text()

        while not stop.is_set():
            async with connection.transaction():
                rows = await connection.fetch(_TAKE, CONCURRENCY)
                replies = await asyncio.gather(*map(send, rows))
                for row, reply in zip(rows, replies, strict=True):
                    await connection.execute(_KEEP, row["id"], reply)
            if not rows:
                await asyncio.sleep(0.1)
    await connection.close()
