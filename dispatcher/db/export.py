"""A whole batch, row by row, with what became of each message."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

from asyncpg import Record

from dispatcher.db.pool import Session

COLUMNS: Final = (
    "id",
    "msisdn",
    "status",
    "status_at",
    "attempts",
    "reply",
    "provider_id",
    "error",
    "batch",
    "dedup_key",
    "created_at",
    "accepted_at",
)

# List the messages of a batch in the order in which they were written.
_BATCH: Final = """
SELECT
    o.id, o.msisdn, o.status, o.status_at, o.attempts, o.reply, o.provider_id, o.error, o.batch,
    o.dedup_key, o.created_at, o.accepted_at
FROM outbox o
WHERE o.batch = $1
ORDER BY o.id
"""


async def batch(session: Session, label: str) -> AsyncGenerator[Record, None]:
    """The messages of a batch, one after the other as COLUMNS. Raises DatabaseLost."""
    async with session.transaction() as connection:
        async for row in connection.cursor(_BATCH, label, prefetch=1000):
            yield row
