"""Workers: who is alive, by the database's clock."""

from __future__ import annotations

import asyncpg

from dispatcher.db.pool import Session

# Enter a worker, and its egress with it.
_ENTER = """
WITH known AS (
    INSERT INTO egress (name) VALUES ($1) ON CONFLICT (name) DO NOTHING
)
INSERT INTO worker (egress, host, pid, version, lease, lease_until)
SELECT $1, $2, $3, $4, l.lease, clock_timestamp() + l.lease
FROM (SELECT make_interval(secs => $5)) AS l (lease)
RETURNING id
"""


async def enter(
    session: Session, egress: str, *, host: str, pid: int, version: str, lease: float
) -> int:
    """Enter a worker with a lease in seconds; returns its number. Raises DatabaseLost."""
    rows = await session.fetch(_ENTER, egress, host, pid, version, lease)
    return int(rows[0]["id"])


# Tell when a worker entered, alike whenever it is asked.
_ENTERED = """
SELECT (extract(epoch FROM w.started_at) * 1000000)::bigint::text AS entered
FROM worker w
WHERE w.id = $1
"""


async def entered(session: Session, worker_id: int) -> str | None:
    """When a worker entered, in microseconds since 1970; None if nobody knows it.

    With its number it tells one database from another. Raises DatabaseLost.
    """
    rows = await session.fetch(_ENTERED, worker_id)
    return rows[0]["entered"] if rows else None


# Tell which database this is: the server and all copies of its files, the database, the table.
_DATABASE = """
SELECT concat_ws('.', c.system_identifier, d.oid, 'worker'::regclass::oid) AS database
FROM pg_control_system() c
JOIN pg_database d ON d.datname = current_database()
"""


async def database(session: Session) -> str:
    """A mark that this outbox has and no other, for when the worker is forgotten.

    Empty if the server does not tell. Raises DatabaseLost.
    """
    try:
        rows = await session.fetch(_DATABASE)
    except (
        asyncpg.InsufficientPrivilegeError,
        asyncpg.UndefinedFunctionError,
        asyncpg.FeatureNotSupportedError,
    ):
        return ""
    return str(rows[0]["database"])


# Renew a worker's lease, and tell whether it had run out: that is looked at with the row locked,
# as a rescuer locks it too.
_BEAT = """
UPDATE worker w
SET beat_at = clock_timestamp(), lease_until = clock_timestamp() + w.lease
FROM (SELECT b.id, b.lease_until FROM worker b WHERE b.id = $1 FOR NO KEY UPDATE) AS before
WHERE w.id = before.id
RETURNING before.lease_until > clock_timestamp() AS unbroken
"""


async def beat(session: Session, worker_id: int) -> bool | None:
    """Renew a worker's lease; None if nobody knows it any more.

    False if it had run out, so that others may have taken what the worker held. Raises
    DatabaseLost.
    """
    rows = await session.fetch(_BEAT, worker_id)
    return rows[0]["unbroken"] if rows else None


# Say whether a worker sleeps, so that inserts know whether to wake it.
_IDLE = """
UPDATE worker w SET idle = $2 WHERE w.id = $1 AND w.idle <> $2
"""


async def set_idle(session: Session, worker_id: int, *, idle: bool) -> None:
    """Say whether a worker is to be woken by inserts. Raises DatabaseLost."""
    await session.fetch(_IDLE, worker_id, idle)


# Let a worker go that holds nothing: its lease ends now.
_LEAVE = """
UPDATE worker w SET lease_until = clock_timestamp(), idle = false WHERE w.id = $1
"""


async def leave(session: Session, worker_id: int) -> None:
    """End a worker's lease. Raises DatabaseLost."""
    await session.fetch(_LEAVE, worker_id)


# Forget workers that are long gone and hold nothing.
_FORGET = """
DELETE FROM worker w
WHERE w.lease_until < clock_timestamp() - interval '1 day'
    AND NOT EXISTS (SELECT FROM outbox o WHERE o.status = 'sending' AND o.worker_id = w.id)
"""


async def forget(session: Session) -> None:
    """Forget workers gone for a day. Raises DatabaseLost."""
    await session.fetch(_FORGET)
