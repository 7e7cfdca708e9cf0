"""The register of services, as operators keep it: add, change, list, pause, resume."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Final, TypedDict

from asyncpg import Record

from dispatcher.db.pool import Session


class Changes(TypedDict, total=False):
    """The columns of `service` that an operator sets; None clears a limit or the patterns."""

    user_id: int
    name: str
    day_limit: int | None
    week_limit: int | None
    month_limit: int | None
    min_delay: timedelta
    timezone: str
    patterns: list[str] | None
    on_unknown: str


# Add a service; the rest is as the table has it by default.
_ADD: Final = """
INSERT INTO service (service_id, user_id) VALUES ($1, $2)
ON CONFLICT (service_id) DO NOTHING
RETURNING service_id
"""

# Change the columns that are named in $2.
_CHANGE: Final = """
UPDATE service s
SET user_id = CASE WHEN 'user_id' = ANY ($2::text[]) THEN $3 ELSE s.user_id END,
    name = CASE WHEN 'name' = ANY ($2) THEN coalesce($4, '') ELSE s.name END,
    day_limit = CASE WHEN 'day_limit' = ANY ($2) THEN $5 ELSE s.day_limit END,
    week_limit = CASE WHEN 'week_limit' = ANY ($2) THEN $6 ELSE s.week_limit END,
    month_limit = CASE WHEN 'month_limit' = ANY ($2) THEN $7 ELSE s.month_limit END,
    min_delay = CASE WHEN 'min_delay' = ANY ($2) THEN $8 ELSE s.min_delay END,
    timezone = CASE WHEN 'timezone' = ANY ($2) THEN $9 ELSE s.timezone END,
    patterns = CASE WHEN 'patterns' = ANY ($2) THEN $10 ELSE s.patterns END,
    on_unknown = CASE WHEN 'on_unknown' = ANY ($2) THEN $11 ELSE s.on_unknown END
WHERE s.service_id = $1
RETURNING s.service_id
"""


async def add(session: Session, service_id: int, given: Changes) -> bool:
    """Add a service with at least a user; False if it is there already. Raises DatabaseLost."""
    async with session.transaction() as connection:
        if not await connection.fetch(_ADD, service_id, given["user_id"]):
            return False
        await connection.fetch(_CHANGE, service_id, list(given), *_values(given))
        return True


async def change(session: Session, service_id: int, given: Changes) -> bool:
    """Change the given columns of a service; False if nobody knows it. Raises DatabaseLost."""
    return bool(await session.fetch(_CHANGE, service_id, list(given), *_values(given)))


def _values(given: Mapping[str, object]) -> list[object]:
    return [given.get(column) for column in Changes.__annotations__]


# Let a service wait for an operator.
_PAUSE: Final = """
UPDATE service s SET paused = true WHERE s.service_id = $1 RETURNING s.service_id
"""


async def pause(session: Session, service_id: int) -> bool:
    """Let a service claim nothing more; False if nobody knows it. Raises DatabaseLost."""
    return bool(await session.fetch(_PAUSE, service_id))


# Lift all that holds a service: the pause, the blocks, and the windows that the provider closed.
_RESUME: Final = """
WITH resumed AS (
    UPDATE service s
    SET paused = false, blocked_until = NULL, blocked_reason = NULL
    WHERE s.service_id = $1
    RETURNING s.service_id
),
unblocked AS (
    UPDATE egress_service e
    SET blocked_until = NULL, blocked_reason = NULL
    FROM resumed r
    WHERE e.service_id = r.service_id AND e.blocked_until IS NOT NULL
),
opened AS (
    UPDATE quota_usage q
    SET closed_until = NULL
    FROM resumed r
    WHERE q.service_id = r.service_id AND q.closed_until > clock_timestamp()
)
SELECT resumed.*, pg_notify('dispatcher', 'service') FROM resumed
"""


async def resume(session: Session, service_id: int) -> bool:
    """Let a service send again; False if nobody knows it. Raises DatabaseLost."""
    return bool(await session.fetch(_RESUME, service_id))


# List the services, with what holds each.
_LIST: Final = """
SELECT
    s.service_id, s.user_id, s.name, s.day_limit, s.week_limit, s.month_limit, s.min_delay,
    s.timezone, s.patterns, s.on_unknown, s.paused, s.blocked_until, s.blocked_reason,
    ARRAY(
        SELECT e.egress
        FROM egress_service e
        WHERE e.service_id = s.service_id AND e.blocked_until IS NOT NULL
        ORDER BY e.egress
    ) AS blocked_egresses
FROM service s
ORDER BY s.service_id
"""


async def listed(session: Session) -> list[Record]:
    """All services, in the order of their numbers. Raises DatabaseLost."""
    return await session.fetch(_LIST)
