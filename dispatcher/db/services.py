"""Services: what blocks them, and how fast they go."""

from __future__ import annotations

from typing import Final

from dispatcher.db.outbox import GUARD, LEAD
from dispatcher.db.pool import Record, Session

# Block a service for everybody; a service that is blocked already keeps its next probe.
_BLOCK = """
UPDATE service s
SET blocked_until = clock_timestamp() + make_interval(secs => $3), blocked_reason = $2
WHERE s.service_id = $1 AND (s.blocked_until IS NULL OR $4)
RETURNING s.blocked_until
"""

# Block a service for one egress; one that is blocked already keeps its next probe.
_BLOCK_HERE = """
INSERT INTO egress_service AS e (egress, service_id, blocked_reason, blocked_until)
VALUES ($5, $1, $2, clock_timestamp() + make_interval(secs => $3))
ON CONFLICT (egress, service_id) DO UPDATE
SET blocked_until = excluded.blocked_until, blocked_reason = excluded.blocked_reason
WHERE e.blocked_until IS NULL OR $4
RETURNING e.blocked_until
"""


async def block(
    session: Session,
    service_id: int,
    reason: str,
    interval: float,
    *,
    probe: bool,
    egress: str | None = None,
) -> Record | None:
    """Block a service until a probe in `interval` seconds; for one egress if it is given.

    `probe`: the answer is that of a probe, so the wait begins anew. Returns the block unless one
    stands. Raises DatabaseLost.
    """
    if egress is None:
        rows = await session.fetch(_BLOCK, service_id, reason, interval, probe)
    else:
        rows = await session.fetch(_BLOCK_HERE, service_id, reason, interval, probe, egress)
    return rows[0] if rows else None


# Lift the blocks of a service, for everybody and for one egress.
_UNBLOCK = """
WITH here AS (
    UPDATE egress_service e
    SET blocked_until = NULL, blocked_reason = NULL
    WHERE e.egress = $2 AND e.service_id = $1 AND e.blocked_until IS NOT NULL
    RETURNING e.service_id
),
everywhere AS (
    UPDATE service s
    SET blocked_until = NULL, blocked_reason = NULL
    WHERE s.service_id = $1 AND s.blocked_until IS NOT NULL
    RETURNING s.service_id
)
SELECT service_id FROM here
UNION
SELECT service_id FROM everywhere
"""


async def unblock(session: Session, service_id: int, egress: str) -> bool:
    """Let a service send again; tells whether it was blocked. Raises DatabaseLost."""
    return bool(await session.fetch(_UNBLOCK, service_id, egress))


# Take the one probe of a blocked service, for every worker: the next is due after the interval.
_TAKE_PROBE = """
WITH here AS (
    UPDATE egress_service e
    SET blocked_until = clock_timestamp() + make_interval(secs => $3)
    WHERE e.egress = $2 AND e.service_id = $1 AND e.blocked_until <= clock_timestamp()
    RETURNING e.service_id
),
everywhere AS (
    UPDATE service s
    SET blocked_until = clock_timestamp() + make_interval(secs => $3)
    WHERE s.service_id = $1 AND s.blocked_until <= clock_timestamp()
    RETURNING s.service_id
)
SELECT service_id FROM here
UNION
SELECT service_id FROM everywhere
"""


async def take_probe(session: Session, service_id: int, egress: str, interval: float) -> bool:
    """Take the probe of a blocked service; False if another worker has it. Raises DatabaseLost."""
    return bool(await session.fetch(_TAKE_PROBE, service_id, egress, interval))


# Set the time of the next probe of a service that stays blocked.
_ARM_PROBE = """
WITH here AS (
    UPDATE egress_service e
    SET blocked_until = clock_timestamp() + make_interval(secs => $3)
    WHERE e.egress = $2 AND e.service_id = $1 AND e.blocked_until IS NOT NULL
)
UPDATE service s
SET blocked_until = clock_timestamp() + make_interval(secs => $3)
WHERE s.service_id = $1 AND s.blocked_until IS NOT NULL
"""


async def arm_probe(session: Session, service_id: int, egress: str, interval: float) -> None:
    """Have a blocked service probed again in `interval` seconds. Raises DatabaseLost."""
    await session.fetch(_ARM_PROBE, service_id, egress, interval)


STEP_SHARE: Final = 0.01
STEP_LEAST: Final = 0.0005
"""A refusal for delay adds 1 % of the minimum delay to a service's extra delay, at least half a
millisecond. Source: the meaning of LIMIT_DELAY, docs/configuration.md."""

STEPS: Final = 5
GROWTH: Final = 1.5
EXTRA_MOST: Final = 5.0
"""After so many steps it is no jitter but a minimum delay that is set too low: the extra delay
then grows by this factor, up to these seconds."""

# Slow a service down, once for all that was refused since its last slowing.
_SLOW = """
UPDATE pace p
SET extra_delay = least(
        make_interval(secs => $7),
        CASE WHEN p.extra_delay < step.size * $5::float8
            THEN p.extra_delay + step.size ELSE p.extra_delay * $6::float8 END
    ),
    slowed_at = clock_timestamp()
FROM outbox o
JOIN service s USING (service_id)
CROSS JOIN LATERAL (
    SELECT greatest(s.min_delay * $3::float8, make_interval(secs => $4))
) AS step (size)
WHERE o.id = $1 AND o.claim_no = $2
    AND p.service_id = o.service_id
    AND o.claimed_at > p.slowed_at
RETURNING p.service_id, extract(epoch FROM p.extra_delay)::float8 AS extra_delay
"""


async def slow(session: Session, message_id: int, claim_no: int) -> Record | None:
    """Slow down the service of a message that the provider found too soon.

    Returns the service and its extra delay in seconds if it changed. Raises DatabaseLost.
    """
    rows = await session.fetch(
        _SLOW, message_id, claim_no, STEP_SHARE, STEP_LEAST, STEPS, GROWTH, EXTRA_MOST
    )
    return rows[0] if rows else None


# Reserve the next free slot of a service, for a message that missed its own.
_RESERVE = """
UPDATE pace p
SET next_slot = greatest(p.next_slot, clock_timestamp() + make_interval(secs => $2))
    + s.min_delay + p.extra_delay
    + CASE WHEN s.min_delay > '0' THEN make_interval(secs => $3) ELSE '0' END
FROM service s
WHERE p.service_id = $1 AND s.service_id = p.service_id
RETURNING extract(epoch FROM p.next_slot - s.min_delay - p.extra_delay
    - CASE WHEN s.min_delay > '0' THEN make_interval(secs => $3) ELSE '0' END)::float8 AS slot
"""


async def reserve(session: Session, service_id: int) -> float:
    """Reserve a slot: seconds since 1970 by the database's clock. Raises DatabaseLost."""
    rows = await session.fetch(_RESERVE, service_id, LEAD, GUARD)
    return float(rows[0]["slot"])
