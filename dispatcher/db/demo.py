"""The demo's own database: filled once, watched while it empties, and compared at the end."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, NamedTuple

from dispatcher.db.pool import Record, Session

NUMBERS: Final = "447700900"
"""How the demo's numbers begin. Ofcom keeps 07700 900000 to 900999 for fiction: nobody has them."""

# Be the only demo on this database, for as long as the connection lasts.
_ALONE = "SELECT pg_try_advisory_lock(1) AS alone"

# Forget what an earlier demo left.
_RESET = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"


async def begin(session: Session) -> bool:
    """Empty the database; False, and then nothing is touched, while another demo uses it."""
    alone = bool((await session.fetch(_ALONE))[0]["alone"])
    if alone:
        await session.script(_RESET)
    return alone


# Add a service, as a user would.
_SERVICE = """
INSERT INTO service (service_id, user_id, name, day_limit, min_delay) VALUES ($1, $2, $3, $4, $5)
"""

# Add its messages, as a user would.
_MESSAGES = """
INSERT INTO outbox (service_id, msisdn, text, batch)
SELECT $1, $4 || lpad((n % 1000)::text, 3, '0'), format('%s no. %s', $2::text, n), 'demo'
FROM generate_series(1, $3::integer) AS n
"""


async def add_service(
    session: Session,
    service_id: int,
    *,
    user_id: int,
    name: str,
    day_limit: int | None,
    min_delay: timedelta,
) -> None:
    """Add one service."""
    await session.fetch(_SERVICE, service_id, user_id, name, day_limit, min_delay)


async def add_messages(session: Session, service_id: int, name: str, count: int) -> None:
    """Add so many messages, no two of them alike."""
    await session.fetch(_MESSAGES, service_id, name, count, NUMBERS)


# Count the messages of each service by their status.
_COUNTS = """
SELECT o.service_id, o.status, count(*) AS messages FROM outbox o GROUP BY o.service_id, o.status
"""


async def counts(session: Session) -> dict[int, dict[str, int]]:
    """How many messages each service has in each status."""
    found: dict[int, dict[str, int]] = {}
    for row in await session.fetch(_COUNTS):
        found.setdefault(row["service_id"], {})[row["status"]] = row["messages"]
    return found


# Count what still moves: it is on its way, or it waits and no used-up window holds it.
_MOVING = """
SELECT count(*) AS messages
FROM outbox o
JOIN service s USING (service_id)
WHERE o.status = 'sending' OR o.status = 'pending' AND NOT EXISTS (
    SELECT
    FROM quota_usage q
    WHERE q.service_id = s.service_id
        AND q.window_start = date_trunc(q.period, clock_timestamp(), s.timezone)
        AND (
            q.closed_until > clock_timestamp()
            OR q.used >= CASE q.period
                WHEN 'day' THEN s.day_limit WHEN 'week' THEN s.week_limit ELSE s.month_limit END
        )
)
"""


async def moving(session: Session) -> int:
    """How many messages are on their way or free to go."""
    return int((await session.fetch(_MOVING))[0]["messages"])


class Window(NamedTuple):
    """A service's day: how much of its limit is used, and when the next day begins."""

    service_id: int
    used: int
    next: datetime
    next_there: str
    """The same, as people there say it."""


# Tell how much of today's limits is used, and when tomorrow begins.
_DAYS = """
SELECT
    s.service_id, q.used, next.day AT TIME ZONE s.timezone AS next,
    to_char(next.day, 'HH24:MI ') || s.timezone AS next_there
FROM service s
JOIN quota_usage q
    ON q.service_id = s.service_id
    AND q.period = 'day'
    AND q.window_start = date_trunc('day', clock_timestamp(), s.timezone)
CROSS JOIN LATERAL (
    SELECT date_trunc('day', clock_timestamp() AT TIME ZONE s.timezone) + interval '1 day'
) AS next (day)
WHERE s.day_limit IS NOT NULL
"""


async def days(session: Session) -> dict[int, Window]:
    """The day of each service that has a limit for it."""
    return {row["service_id"]: Window(*row) for row in await session.fetch(_DAYS)}


# Tell of each message what the provider could know it by, and its status.
_MESSAGES_SENT = "SELECT o.id, o.service_id, o.msisdn, o.text, o.status FROM outbox o ORDER BY o.id"


async def messages(session: Session) -> list[Record]:
    """All messages: id, service_id, msisdn, text, status."""
    return await session.fetch(_MESSAGES_SENT)


# Make sure that what is left is never sent in earnest.
_PAUSE = "UPDATE service SET paused = true"


async def pause(session: Session) -> None:
    """Pause all services."""
    await session.fetch(_PAUSE)
