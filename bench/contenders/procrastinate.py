"""Procrastinate: a job for each message, the answer kept in a table of the user's."""

from __future__ import annotations

import aiohttp
import asyncpg

from bench.contenders.task import CONCURRENCY, Task, message

LABEL = "Procrastinate"
SETTINGS = (
    "PsycopgConnector with a pool of 20, concurrency 100, finished jobs kept, uvloop; the answer "
    "inserted by the job over the same pool"
)
SHARE = 0.1
RECORDED = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"

POOL = 20

_ANSWER = "CREATE TABLE answer (number text PRIMARY KEY, reply text NOT NULL)"
_KEEP = "INSERT INTO answer (number, reply) VALUES (%s, %s)"


async def prepare(task: Task) -> None:
    """Leave the messages waiting, as jobs."""
    from procrastinate import App, PsycopgConnector

    app = App(connector=PsycopgConnector(conninfo=task.dsn))
    defined = app.task(name="send")(_nothing)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        if task.total:
            await defined.batch_defer_async(
                *({"number": number, "text": text} for number, text in task.messages)
            )
    connection = await asyncpg.connect(task.dsn)
    await connection.execute(_ANSWER)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def _nothing(number: str, text: str) -> None:
    """Stands for the job where it is only enqueued."""


async def insert(connection: asyncpg.Connection[asyncpg.Record], index: int) -> None:
    """Add one message, by the function that it enqueues with itself."""
    number, text = message(index)
    await connection.execute(
        "SELECT procrastinate_defer_jobs_v1(ARRAY[ROW('default', 'send', 0, NULL, NULL,"
        " jsonb_build_object('number', $1::text, 'text', $2::text), NULL)"
        "::procrastinate_job_to_defer_v1])",
        number,
        text,
    )


async def run(task: Task) -> None:
    """Send what waits, until told to stop."""
    import psycopg_pool
    from procrastinate import App, PsycopgConnector

    connector = PsycopgConnector(conninfo=task.dsn, min_size=5, max_size=POOL)
    app = App(connector=connector)
    async with app.open_async(), aiohttp.ClientSession() as session:
        pool: psycopg_pool.AsyncConnectionPool = connector.pool

        async def send(number: str, text: str) -> None:
            parameters = message(0)._replace(number=number, text=text).parameters
            async with session.get(task.url, params=parameters) as response:
                reply = await response.text()
            async with pool.connection() as connection:
                await connection.execute(_KEEP, (number, reply))

        app.task(name="send")(send)
        await app.run_worker_async(concurrency=CONCURRENCY)
