"""The whole story of one message, and what could hold it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from asyncpg import Record

from dispatcher.db.overview import windows
from dispatcher.db.pool import Session
from dispatcher.domain.message import Status

AHEAD: Final = 100_000
"""Messages ahead of one that are counted."""

# Tell all of a message but its text, with its service and its worker.
_MESSAGE: Final = """
SELECT
    clock_timestamp() AS now,
    o.id, o.service_id, coalesce(o.recipient, o.msisdn) AS msisdn, length(o.text) AS characters,
    o.extended, o.priority, o.send_after, o.retry_at, o.expires_at, o.dedup_key, o.batch,
    o.created_at, o.status, o.status_at, o.attempts, o.reply, o.provider_id, o.error,
    o.claimed_at, o.accepted_at, o.doubts, o.worker_id,
    w.host AS worker_host, w.lease_until AS worker_lease_until,
    s.name AS service_name, s.paused, s.blocked_until, s.blocked_reason, s.on_unknown,
    s.min_delay + coalesce(p.extra_delay, '0') AS delay, p.next_slot
FROM outbox o
JOIN service s USING (service_id)
LEFT JOIN pace p USING (service_id)
LEFT JOIN worker w ON w.id = o.worker_id
WHERE o.id = $1
"""

# List the requests made for a message.
_ATTEMPTS: Final = """
SELECT a.sent_at, a.worker_id, w.host AS worker_host, a.seconds, a.outcome, a.reply, a.error
FROM attempt a
LEFT JOIN worker w ON w.id = a.worker_id
WHERE a.message_id = $1
ORDER BY a.claim_no
"""

# List the delivery reports on a message, with the provider's own word.
_REPORTS: Final = """
SELECT r.received_at, r.status, r.params ->> $2 AS word
FROM delivery_report r
WHERE r.message_id = $1
ORDER BY r.received_at, r.id
"""

# Tell of each egress whether anybody works there, and whether the message's service may use it.
_WAYS: Final = """
SELECT
    e.name, e.banned_until, e.ill_until, here.blocked_until, here.blocked_reason,
    (SELECT count(*) FROM worker w WHERE w.egress = e.name AND w.lease_until > clock_timestamp())
        AS workers
FROM egress e
LEFT JOIN egress_service here ON here.egress = e.name AND here.service_id = $1
ORDER BY e.name
"""

# Count the messages of its service that are due and go before a waiting one.
_AHEAD: Final = """
SELECT count(*) AS ahead
FROM (
    SELECT
    FROM outbox o
    JOIN outbox this ON this.id = $1
    WHERE o.status = 'pending'
        AND o.service_id = this.service_id
        AND greatest(o.send_after, o.retry_at)
            <= greatest(clock_timestamp(), this.send_after, this.retry_at)
        AND (o.priority, greatest(this.send_after, this.retry_at), this.id)
            > (this.priority, greatest(o.send_after, o.retry_at), o.id)
    LIMIT $2
) first
"""


Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Story:
    """Rows as the statements above return them; `ahead` only for a waiting message."""

    message: Row
    attempts: list[Row]
    reports: list[Row]
    ways: list[Row]
    windows: list[Row]
    ahead: int


def _row(record: Record) -> Row:
    """A row whose times can all be compared: asyncpg gives infinite ones without a zone."""
    return {
        name: value.replace(tzinfo=UTC) if isinstance(value, datetime) else value
        for name, value in record.items()
    }


async def story(session: Session, message_id: int, status_param: str) -> Story | None:
    """The story of a message; None if there is none with this id. Raises DatabaseLost.

    `status_param`: the parameter in which reports bring the provider's word.
    """
    rows = await session.fetch(_MESSAGE, message_id)
    if not rows:
        return None
    message = _row(rows[0])
    waits = message["status"] == Status.PENDING
    return Story(
        message=message,
        attempts=[_row(row) for row in await session.fetch(_ATTEMPTS, message_id)],
        reports=[_row(row) for row in await session.fetch(_REPORTS, message_id, status_param)],
        ways=[_row(row) for row in await session.fetch(_WAYS, message["service_id"])],
        windows=[_row(row) for row in await windows(session, message["service_id"])],
        ahead=(await session.fetch(_AHEAD, message_id, AHEAD))[0]["ahead"] if waits else 0,
    )
