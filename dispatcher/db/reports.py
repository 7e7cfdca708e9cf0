"""Delivery reports: each is kept whole, matched with its message and applied to it.

A report whose message is not known yet, or is locked by somebody, waits with `message_id` null and
is looked at again. No statement here waits for a row lock, so nothing that others do to the outbox
keeps a report from being stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from dispatcher.db.pool import Record, Session
from dispatcher.domain.message import Status

LOOK: Final = 5000
"""Waiting reports that one statement looks at, at most."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the provider reported."""

    provider_id: str
    status: Status | None
    """What its word means, None if that is not known."""
    params: str
    """All that came, as a JSON object that jsonb can hold: no NUL, no lone surrogate."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A report as it met its message."""

    provider_id: str
    status: Status | None
    message_id: int | None
    """None while the message is not known."""
    before: Status | None
    """The status of the message before this report and all that were applied with it."""
    since_accepted: float | None
    """Seconds from the acceptance of the message to the arrival of the report."""
    waited: float
    """Seconds from the arrival of the report to now."""


# The message of a report is the one accepted last under its identifier.
_MESSAGE: Final = """
    SELECT o.id AS message_id, o.status AS message_status, o.accepted_at
    FROM outbox o
    WHERE o.provider_id = r.provider_id
    ORDER BY o.accepted_at DESC NULLS LAST, o.id DESC
    LIMIT 1
"""

# Move messages forward by the reports in `found`, in the order of their turns: the first that tells
# an end decides. A report is not applied if its message should move and is locked, or has changed.
_ADVANCE: Final = """
told AS MATERIALIZED (
    SELECT t.message_id, t.status
    FROM (
        SELECT
            f.message_id, f.message_status,
            coalesce(
                (array_agg(f.status ORDER BY f.turn) FILTER (WHERE f.status <> 'enroute'))[1],
                'enroute'
            ) AS status
        FROM found f
        WHERE f.status IS NOT NULL AND f.message_status IN ('accepted', 'enroute')
        GROUP BY f.message_id, f.message_status
    ) t
    WHERE t.status <> t.message_status
),
moving AS MATERIALIZED (
    SELECT o.id, t.status
    FROM told t
    JOIN outbox o ON o.id = t.message_id
    WHERE o.status IN ('accepted', 'enroute') AND o.status <> t.status
    FOR NO KEY UPDATE OF o SKIP LOCKED
),
moved AS (
    UPDATE outbox o
    SET status = m.status, status_at = clock_timestamp()
    FROM moving m
    WHERE o.id = m.id
),
applied AS MATERIALIZED (
    SELECT
        f.*,
        CASE WHEN t.message_id IS NULL OR m.id IS NOT NULL THEN f.message_id END AS applied_to
    FROM found f
    LEFT JOIN told t USING (message_id)
    LEFT JOIN moving m ON m.id = f.message_id
)
"""

_TOLD: Final = """
    a.provider_id, a.status, a.applied_to, a.message_status,
    extract(epoch FROM a.received_at - a.accepted_at)::float8,
    extract(epoch FROM clock_timestamp() - a.received_at)::float8
"""

# Store reports in the order they came, and apply those whose message is known.
_RECEIVE: Final = f"""
WITH found AS MATERIALIZED (
    SELECT r.*, clock_timestamp() AS received_at, m.*
    FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY
        AS r (provider_id, status, params, turn)
    LEFT JOIN LATERAL ({_MESSAGE}) m ON true
),
{_ADVANCE},
kept AS (
    INSERT INTO delivery_report (provider_id, status, received_at, message_id, params)
    SELECT a.provider_id, a.status, a.received_at, a.applied_to, a.params::jsonb
    FROM applied a
    ORDER BY a.turn
)
SELECT {_TOLD}
FROM applied a
ORDER BY a.turn
"""  # noqa: S608 - of constants only


async def receive(session: Session, reports: Sequence[Report]) -> list[Applied]:
    """Store reports, and apply those whose message is known; returns them in their order.

    Run again after a loss it stores them again, which does no harm. Raises DatabaseLost.
    """
    rows = await session.fetch(
        _RECEIVE,
        [report.provider_id for report in reports],
        [report.status for report in reports],
        [report.params for report in reports],
    )
    return [_applied(row) for row in rows]


# Apply reports that wait, the newest first: those of the last $1 seconds that came until $2.
_APPLY: Final = f"""
WITH looked AS MATERIALIZED (
    SELECT d.id, d.provider_id, d.received_at
    FROM delivery_report d
    WHERE d.message_id IS NULL
        AND d.received_at > now() - make_interval(secs => $1)
        AND d.received_at <= coalesce($2::timestamptz, 'infinity')
    ORDER BY d.received_at DESC
    LIMIT $3
),
known AS MATERIALIZED (
    SELECT r.id, m.*
    FROM looked r
    CROSS JOIN LATERAL ({_MESSAGE}) m
),
found AS MATERIALIZED (
    SELECT
        d.id AS turn, d.provider_id, d.status, d.received_at,
        k.message_id, k.message_status, k.accepted_at
    FROM known k
    JOIN delivery_report d USING (id)
    WHERE d.message_id IS NULL
    FOR NO KEY UPDATE OF d SKIP LOCKED
),
{_ADVANCE},
matched AS (
    UPDATE delivery_report d
    SET message_id = a.applied_to
    FROM applied a
    WHERE d.id = a.turn AND a.applied_to IS NOT NULL
)
SELECT {_TOLD}, l.reports AS looked_at, l.oldest
FROM (SELECT count(*) AS reports, min(received_at) AS oldest FROM looked) l
LEFT JOIN applied a ON a.applied_to IS NOT NULL
ORDER BY a.turn
"""  # noqa: S608 - of constants only


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at waiting reports found."""

    applied: list[Applied]
    waiting: int
    """Reports that still wait, of those looked at."""
    oldest: datetime | None
    """When the oldest looked at came; None if that was the last of them."""


async def apply(session: Session, within: float, until: datetime | None = None) -> Look:
    """Apply reports that came in the last `within` seconds and whose message is known by now.

    At most `LOOK` are looked at, the newest of those that came until `until`. Any number of
    processes may do it at once. Raises DatabaseLost.
    """
    rows = await session.fetch(_APPLY, within, until, LOOK)
    looked_at, oldest = rows[0]["looked_at"], rows[0]["oldest"]
    applied = [_applied(row) for row in rows if row[0] is not None]
    return Look(applied, looked_at - len(applied), oldest if looked_at == LOOK else None)


def _applied(row: Record) -> Applied:
    provider_id, status, message_id, before, since_accepted, waited, *_ = row
    return Applied(
        provider_id,
        None if status is None else Status(status),
        message_id,
        None if message_id is None else Status(before),
        since_accepted,
        waited,
    )
