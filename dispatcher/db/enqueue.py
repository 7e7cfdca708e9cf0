"""Putting messages into the outbox: one, or a whole file of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from dispatcher.db.pool import Session

# Tell the database's time.
_NOW: Final = "SELECT clock_timestamp() AS now"


async def now(session: Session) -> datetime:
    """The database's time. Raises DatabaseLost."""
    found: datetime = (await session.fetch(_NOW))[0]["now"]
    return found


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be put into the outbox; None stands for the table's own default."""

    msisdn: str
    text: str
    extended: bool | None = None
    priority: int | None = None
    send_after: datetime | None = None
    expires_at: datetime | None = None
    dedup_key: str | None = None
    batch: str | None = None


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of a message to be put into the outbox."""

    id: int | None
    """Its id, or that of the one that already has its `dedup_key`; None without a service."""
    new: bool


# Put a message into the outbox, unless its service is unknown or its key is there already.
_ENQUEUE: Final = """
WITH written AS (
    INSERT INTO outbox (
        service_id, msisdn, text, extended, priority, send_after, expires_at, dedup_key, batch)
    SELECT
        s.service_id, $2, $3, coalesce($4, true), coalesce($5, 0), coalesce($6, now()), $7, $8, $9
    FROM service s
    WHERE s.service_id = $1
    ON CONFLICT (service_id, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING
    RETURNING id
)
SELECT w.id, true AS new FROM written w
UNION ALL
SELECT o.id, false FROM outbox o WHERE o.service_id = $1 AND o.dedup_key = $8
"""


async def enqueue(session: Session, service_id: int, message: NewMessage) -> Enqueued:
    """Put one message into the outbox. Raises DatabaseLost."""
    for _ in range(2):
        rows = await session.fetch(
            _ENQUEUE,
            service_id,
            message.msisdn,
            message.text,
            message.extended,
            message.priority,
            message.send_after,
            message.expires_at,
            message.dedup_key,
            message.batch,
        )
        if rows:
            return Enqueued(rows[0]["id"], rows[0]["new"])
        # One who was quicker by less than a statement's snapshot is seen by the next.
    return Enqueued(None, new=False)


# Tell which texts match none of a service's patterns, by their place in $2.
_MISFITS: Final = """
SELECT t.place
FROM service s
CROSS JOIN unnest($2::text[]) WITH ORDINALITY AS t (text, place)
WHERE s.service_id = $1
    AND s.patterns IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM unnest(s.patterns) AS pattern
        WHERE t.text ~ dispatcher_whole_pattern(pattern)
    )
"""


async def fits(session: Session, service_id: int, text: str) -> bool:
    """Whether a text matches the service's patterns, if it has any. Raises DatabaseLost."""
    return not await session.fetch(_MISFITS, service_id, [text])
