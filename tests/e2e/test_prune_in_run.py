from __future__ import annotations

import asyncpg

from tests.builders import add_message, add_service
from tests.e2e import harness


async def test_worker_prunes(database: str, connection: asyncpg.Connection) -> None:
    """A worker that is told so removes what was finished long ago, and nothing else."""
    await add_service(connection, paused=True)
    old = await add_message(connection, status="delivered")
    await add_message(connection, status="delivered", text="young")
    await add_message(connection, text="waits")
    await connection.execute(
        "UPDATE outbox SET status_at = now() - interval '40 days' WHERE id = $1", old
    )

    async with harness.worker(database, "http://127.0.0.1:9/", prune_days=30) as worker:
        assert (await worker.event("outbox.pruned"))["messages"] == 1

    rows = await connection.fetch("SELECT text FROM outbox ORDER BY text")
    assert [row["text"] for row in rows] == ["waits", "young"]
