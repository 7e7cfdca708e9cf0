"""PgQueuer: a job for each message, the answer kept in a table of the user's."""

from __future__ import annotations

import asyncio
import json
import signal

import aiohttp
import asyncpg

from bench.contenders.task import CONCURRENCY, Task, message

LABEL = "PgQueuer"
SETTINGS = (
    "AsyncpgDriver on a connection of its own, batch_size 50 (the fastest of 10, 25 and 50), "
    "max_concurrent_tasks 100, durability 'durable', its own autovacuum settings, uvloop; the "
    "answer inserted by the job over a pool of 20"
)
SHARE = 0.4
RECORDED = "SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'"

BATCH = CONCURRENCY // 2
"""The most that it allows with so many tasks."""

_ANSWER = "CREATE TABLE answer (number text PRIMARY KEY, reply text NOT NULL)"
_KEEP = "INSERT INTO answer (number, reply) VALUES ($1, $2)"


async def prepare(task: Task) -> None:
    """Leave the messages waiting, as jobs."""
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    connection = await asyncpg.connect(task.dsn)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()
    await connection.execute(_ANSWER)
    if task.total:
        payloads = [json.dumps(list(message)).encode() for message in task.messages]
        await queries.enqueue(["send"] * task.total, payloads, [0] * task.total)
    await connection.execute("VACUUM ANALYZE pgqueuer")
    await connection.close()


async def insert(connection: asyncpg.Connection[asyncpg.Record], index: int) -> None:
    """Add one message."""
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.queries import Queries

    queries = Queries(AsyncpgDriver(connection))
    await queries.enqueue("send", json.dumps(list(message(index))).encode())


async def run(task: Task) -> None:
    """Send what waits, until told to stop."""
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgDriver

    async with (
        asyncpg.create_pool(task.dsn, min_size=5, max_size=20) as pool,
        aiohttp.ClientSession() as session,
    ):
        queue = PgQueuer(AsyncpgDriver(await asyncpg.connect(task.dsn)))

        # Its annotation, were there one, would be looked up for a context to pass in.
        async def send(job) -> None:  # type: ignore[no-untyped-def]
            number, text = json.loads(job.payload)
            parameters = message(0)._replace(number=number, text=text).parameters
            async with session.get(task.url, params=parameters) as response:
                reply = await response.text()
            await pool.execute(_KEEP, number, reply)

        queue.entrypoint("send")(send)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queue.shutdown.set)
        await queue.run(batch_size=BATCH, max_concurrent_tasks=CONCURRENCY)
