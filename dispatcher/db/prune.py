"""Removing what is finished and old, in small steps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from dispatcher.db.pool import Session

STEP: Final = 5000
"""Rows that are looked at in one statement."""

# Tell between which ids the messages are.
_ENDS: Final = "SELECT min(o.id) AS first, max(o.id) AS last FROM outbox o"

# Look at the next messages: remove those that are finished and old, with their attempts and
# reports, but keep those whose key is young.
_MESSAGES: Final = """
WITH seen AS MATERIALIZED (
    SELECT
        o.id,
        o.status IN (
            'accepted', 'enroute', 'delivered', 'undeliverable', 'rejected', 'expired', 'cancelled')
            AND o.status_at < clock_timestamp() - $3::interval AS old,
        o.dedup_key IS NOT NULL
            AND coalesce(o.created_at > clock_timestamp() - $4::interval, false) AS young_key
    FROM outbox o
    WHERE o.id > $1
    ORDER BY o.id
    LIMIT $2
),
messages AS (
    DELETE FROM outbox o
    USING seen s
    WHERE o.id = s.id
        AND s.old
        AND NOT s.young_key
        AND o.status IN (
            'accepted', 'enroute', 'delivered', 'undeliverable', 'rejected', 'expired', 'cancelled')
    RETURNING o.id
),
attempts AS (
    DELETE FROM attempt a USING messages m WHERE a.message_id = m.id
),
reports AS (
    DELETE FROM delivery_report r USING messages m WHERE r.message_id = m.id
)
SELECT
    (SELECT max(s.id) FROM seen s) AS last,
    (SELECT count(*) FROM messages) AS removed,
    (SELECT count(*) FROM seen s WHERE s.old AND s.young_key) AS kept
"""

# Remove reports for which no message was ever found.
_REPORTS: Final = """
DELETE FROM delivery_report r
WHERE r.id IN (
    SELECT w.id
    FROM delivery_report w
    WHERE w.message_id IS NULL AND w.received_at < clock_timestamp() - $1::interval
    LIMIT $2
)
RETURNING r.id
"""

# Remove counts of windows that have ended, by a month and a day at most.
_WINDOWS: Final = """
DELETE FROM quota_usage q
WHERE q.window_start + interval '32 days' < clock_timestamp() - $1::interval
RETURNING q.service_id
"""

# Remove workers that are gone and hold nothing.
_WORKERS: Final = """
DELETE FROM worker w
WHERE w.lease_until < clock_timestamp() - greatest($1::interval, w.lease)
    AND NOT EXISTS (SELECT FROM outbox o WHERE o.status = 'sending' AND o.worker_id = w.id)
RETURNING w.id
"""


@dataclass(slots=True)
class Pruned:
    """What was removed so far."""

    done: float = 0.0
    """How far it has got with the messages, up to 1."""
    messages: int = 0
    kept: int = 0
    """Messages that are old enough, but have a key that is not."""
    reports: int = 0
    """Reports on no known message."""
    windows: int = 0
    workers: int = 0


async def prune(
    session: Session, older_than: timedelta, keep_dedup: timedelta | None = None
) -> AsyncIterator[Pruned]:
    """Remove what has been finished for longer than a time, and tell after each step how far it is.

    What is pending, being sent or in doubt stays, and what has a `dedup_key` younger than
    `keep_dedup`. Raises DatabaseLost.
    """
    pruned = Pruned()
    ends = (await session.fetch(_ENDS))[0]
    if ends["first"] is not None:
        after, span = ends["first"] - 1, ends["last"] - ends["first"] + 1
        while after < ends["last"]:
            row = (await session.fetch(_MESSAGES, after, STEP, older_than, keep_dedup))[0]
            after = row["last"] or ends["last"]  # nothing, where others have removed the rest
            pruned.messages += row["removed"]
            pruned.kept += row["kept"]
            pruned.done = min(1.0, (after - ends["first"] + 1) / span)
            yield pruned
    pruned.done = 1.0
    while removed := len(await session.fetch(_REPORTS, older_than, STEP)):
        pruned.reports += removed
        yield pruned
    pruned.windows = len(await session.fetch(_WINDOWS, older_than))
    pruned.workers = len(await session.fetch(_WORKERS, older_than))
    yield pruned
