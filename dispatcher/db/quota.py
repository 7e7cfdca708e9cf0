"""The durable count of what each service has sent in its day, week and month."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dispatcher.db.pool import Record, Session

# Make the rows that count the current windows, and the row that keeps the pace.
_OPEN_WINDOWS = """
WITH paced AS (
    INSERT INTO pace (service_id)
    SELECT s.service_id
    FROM service s
    WHERE s.service_id = ANY ($1::bigint[])
    ON CONFLICT (service_id) DO NOTHING
)
INSERT INTO quota_usage (service_id, period, window_start)
SELECT s.service_id, period.name, date_trunc(period.name, clock_timestamp(), s.timezone)
FROM service s
CROSS JOIN (VALUES ('day'), ('week'), ('month')) AS period (name)
WHERE s.service_id = ANY ($1::bigint[])
ON CONFLICT (service_id, period, window_start) DO NOTHING
"""


async def open_windows(session: Session, services: Sequence[int]) -> None:
    """Open the current windows of services. Raises DatabaseLost."""
    await session.fetch(_OPEN_WINDOWS, list(services))


# Tell which services may claim nothing in a current window, by our count or the provider's word.
_SPENT = """
SELECT s.service_id
FROM service s
WHERE s.service_id = ANY ($1::bigint[])
    AND EXISTS (
        SELECT
        FROM (
            VALUES ('day', s.day_limit), ('week', s.week_limit), ('month', s.month_limit)
        ) AS period (name, its_limit)
        JOIN quota_usage q
            ON q.service_id = s.service_id
            AND q.period = period.name
            AND q.window_start = date_trunc(period.name, statement_timestamp(), s.timezone)
        WHERE q.used >= period.its_limit OR q.closed_until > statement_timestamp()
    )
"""


async def spent(session: Session, services: Sequence[int]) -> set[int]:
    """Those of the services whose quota is used up. Raises DatabaseLost."""
    return {row["service_id"] for row in await session.fetch(_SPENT, list(services))}


EARLY: Final = 300.0
"""Seconds of a new window in which a spent limit is the provider's clock running behind."""

EARLY_WAIT: Final = 60.0
"""Seconds to wait then. Source of both: the meaning of LIMIT_* in section 'Limits' of the docs."""

# Believe the provider that a window is spent: close the one that the message was debited to.
_CLOSE_WINDOW = """
UPDATE quota_usage q
SET closed_until = CASE
        WHEN clock_timestamp() < q.window_start + make_interval(secs => $4)
        THEN clock_timestamp() + make_interval(secs => $5)
        ELSE (
            (q.window_start AT TIME ZONE s.timezone)
            + CASE $3 WHEN 'day' THEN interval '1 day' WHEN 'week' THEN interval '7 days'
                ELSE interval '1 month' END
        ) AT TIME ZONE s.timezone
    END
FROM outbox o
JOIN service s USING (service_id)
WHERE o.id = $1 AND o.claim_no = $2
    AND q.service_id = o.service_id
    AND q.period = $3
    AND q.window_start = date_trunc($3, o.claimed_at, s.timezone)
    AND (q.closed_until IS NULL OR q.closed_until <= clock_timestamp())
RETURNING q.service_id, q.period, q.used, q.closed_until
"""


async def close_window(
    session: Session, message_id: int, claim_no: int, period: str
) -> Record | None:
    """Close the window of a message that the provider refused for its limit.

    Returns the window if it was open until now. Raises DatabaseLost.
    """
    rows = await session.fetch(_CLOSE_WINDOW, message_id, claim_no, period, EARLY, EARLY_WAIT)
    return rows[0] if rows else None
