"""How all stands: counts, quotas, what is closed, who works, what went wrong last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from asyncpg import Record

from dispatcher.db.pool import Session

PAGES: Final = 65_536
"""Pages of 8 KiB of the outbox that are looked at; of a larger one a sample this large."""

ERRORS: Final = 5

# Count messages by their status, in a sample if the outbox is too large to be read whole.
_COUNTS: Final = """
SELECT
    o.status,
    count(*) AS messages,
    count(*) FILTER (WHERE o.accepted_at > clock_timestamp() - interval '1 minute') AS accepted
FROM outbox o TABLESAMPLE SYSTEM ((SELECT least(100, $1 * 100.0 / greatest(1, p.pages)) FROM (
    SELECT pg_relation_size('outbox') / current_setting('block_size')::bigint) p (pages)))
GROUP BY o.status
"""

# Tell the time, and how large the sample is, from 0 to 1.
_SAMPLE: Final = """
SELECT clock_timestamp() AS now, least(1, $1::float8 / greatest(1, p.pages)) AS share
FROM (SELECT pg_relation_size('outbox') / current_setting('block_size')::bigint) p (pages)
"""

# Tell of each service how it stands and what it has on its way.
_SERVICES: Final = """
SELECT
    s.service_id, s.name, s.paused, s.blocked_until, s.blocked_reason, s.on_unknown,
    s.min_delay, p.extra_delay,
    w.pending, w.due, w.oldest_due_age,
    (SELECT count(*) FROM outbox o WHERE o.status = 'sending' AND o.service_id = s.service_id)
        AS sending,
    (SELECT count(*) FROM outbox o WHERE o.status = 'unknown' AND o.service_id = s.service_id)
        AS in_doubt
FROM service s
LEFT JOIN pace p USING (service_id)
CROSS JOIN LATERAL (
    SELECT
        count(*) AS pending,
        count(*) FILTER (WHERE greatest(o.send_after, o.retry_at) <= clock_timestamp()) AS due,
        clock_timestamp() - min(greatest(o.send_after, o.retry_at))
            FILTER (WHERE greatest(o.send_after, o.retry_at) <= clock_timestamp())
            AS oldest_due_age
    FROM outbox o
    WHERE o.status = 'pending' AND o.service_id = s.service_id
) w
ORDER BY s.service_id
"""

# Tell what each service has used of its windows, and when the next ones begin.
_WINDOWS: Final = """
SELECT
    s.service_id,
    period.name AS period,
    coalesce(q.used, 0) AS used,
    CASE period.name
        WHEN 'day' THEN s.day_limit WHEN 'week' THEN s.week_limit ELSE s.month_limit
    END AS "limit",
    CASE WHEN q.closed_until > m.now THEN q.closed_until END AS closed_until,
    (date_trunc(period.name, m.now AT TIME ZONE s.timezone) + period.step)
        AT TIME ZONE s.timezone AS next_window
FROM (SELECT clock_timestamp()) AS m (now)
CROSS JOIN service s
CROSS JOIN (VALUES
    ('day', interval '1 day'), ('week', interval '7 days'), ('month', interval '1 month')
) AS period (name, step)
LEFT JOIN quota_usage q
    ON q.service_id = s.service_id
    AND q.period = period.name
    AND q.window_start = date_trunc(period.name, m.now, s.timezone)
WHERE $1::bigint IS NULL OR s.service_id = $1
ORDER BY s.service_id, period.step
"""


async def windows(session: Session, service_id: int | None = None) -> list[Record]:
    """The current windows of all services, or of one. Raises DatabaseLost."""
    return await session.fetch(_WINDOWS, service_id)


# Tell which services an egress may not use.
_BLOCKED_HERE: Final = """
SELECT e.service_id, e.egress, e.blocked_until, e.blocked_reason
FROM egress_service e
WHERE e.blocked_until IS NOT NULL
ORDER BY e.service_id, e.egress
"""

# Tell how each egress stands.
_EGRESSES: Final = """
SELECT e.name, e.banned_until, e.ban_episode, e.ill_until FROM egress e ORDER BY e.name
"""

# Tell who works.
_WORKERS: Final = """
SELECT
    w.id, w.egress, w.host, w.pid, w.version, w.started_at, w.beat_at, w.lease_until,
    (SELECT count(*) FROM outbox o WHERE o.status = 'sending' AND o.worker_id = w.id) AS holds
FROM worker w
WHERE w.lease_until > clock_timestamp()
ORDER BY w.id
"""

# Find what went wrong last, in a sample if the outbox is too large to be read whole.
_ERRORS: Final = """
SELECT
    o.id, o.service_id, coalesce(o.recipient, o.msisdn) AS msisdn, o.status, o.status_at,
    o.reply, o.error
FROM outbox o TABLESAMPLE SYSTEM ((SELECT least(100, $1 * 100.0 / greatest(1, p.pages)) FROM (
    SELECT pg_relation_size('outbox') / current_setting('block_size')::bigint) p (pages)))
WHERE o.error IS NOT NULL
ORDER BY o.status_at DESC
LIMIT $2
"""


@dataclass(frozen=True, slots=True)
class Overview:
    """Rows as the statements above return them."""

    now: datetime
    """The database's time."""
    share: float
    """How much of the outbox was counted, up to 1: the counts are to be divided by it."""
    counts: list[Record]
    services: list[Record]
    windows: list[Record]
    blocked_here: list[Record]
    egresses: list[Record]
    workers: list[Record]
    errors: list[Record]


async def overview(session: Session) -> Overview:
    """Look at everything once. Raises DatabaseLost."""
    sample = (await session.fetch(_SAMPLE, PAGES))[0]
    return Overview(
        now=sample["now"],
        share=sample["share"],
        counts=await session.fetch(_COUNTS, PAGES),
        services=await session.fetch(_SERVICES),
        windows=await windows(session),
        blocked_here=await session.fetch(_BLOCKED_HERE),
        egresses=await session.fetch(_EGRESSES),
        workers=await session.fetch(_WORKERS),
        errors=await session.fetch(_ERRORS, PAGES, ERRORS),
    )
