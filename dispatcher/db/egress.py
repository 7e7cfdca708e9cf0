"""What the workers behind one IP address know together: a ban, an illness of the provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dispatcher.db.pool import Record, Session
from dispatcher.domain.message import Probe

ILL_FIRST: Final = 5.0
ILL_MOST: Final = 300.0
"""Seconds before the first probe of an ill provider, and the most they double to."""


@dataclass(frozen=True, slots=True)
class State:
    """Whether an egress is open, and when it may be probed if it is not."""

    banned: bool
    ill: bool
    ban_episode: int
    probe_in: float | None
    """Seconds until a probe is due, at most 0 if it is; None while the egress is open."""

    @property
    def open(self) -> bool:
        """Whether messages may go out."""
        return not (self.banned or self.ill)


# Tell how an egress stands.
_STATE = """
SELECT
    e.banned_until IS NOT NULL AS banned,
    e.ill_until IS NOT NULL AS ill,
    e.ban_episode,
    extract(epoch FROM greatest(e.banned_until, e.ill_until) - clock_timestamp())::float8
        AS probe_in
FROM egress e
WHERE e.name = $1
"""


async def state(session: Session, name: str) -> State:
    """How an egress stands. Raises DatabaseLost."""
    rows = await session.fetch(_STATE, name)
    return State(*rows[0])


# Open a new episode of a ban, unless the request belongs to an older one; wake all workers.
_BAN = """
WITH banned AS (
    UPDATE egress e
    SET ban_episode = e.ban_episode + 1,
        ban_wait = make_interval(secs => $3),
        banned_until = clock_timestamp() + make_interval(secs => $3 * $4)
    WHERE e.name = $1 AND e.ban_episode = $2 AND e.banned_until IS NULL
    RETURNING e.ban_episode, e.banned_until
)
SELECT banned.*, pg_notify('dispatcher', 'closed:' || $1) FROM banned
"""


async def ban(
    session: Session, name: str, episode: int, wait: float, jitter: float
) -> Record | None:
    """Begin a ban of `wait` seconds times `jitter`, seen by a request of the given episode.

    Returns the episode if it is new. Raises DatabaseLost.
    """
    rows = await session.fetch(_BAN, name, episode, wait, jitter)
    return rows[0] if rows else None


# Begin to wait for an ill provider; wake all workers.
_SICKEN = """
WITH ill AS (
    UPDATE egress e
    SET ill_wait = make_interval(secs => $2),
        ill_until = clock_timestamp() + make_interval(secs => $2)
    WHERE e.name = $1 AND e.ill_until IS NULL
    RETURNING e.ill_until
)
SELECT ill.*, pg_notify('dispatcher', 'closed:' || $1) FROM ill
"""


async def sicken(session: Session, name: str) -> Record | None:
    """Pause an egress because its outcomes are in doubt; None if it is. Raises DatabaseLost."""
    rows = await session.fetch(_SICKEN, name, ILL_FIRST)
    return rows[0] if rows else None


# Take the one probe of a closed egress; if its worker dies, the next is due after the wait.
_TAKE_PROBE = """
UPDATE egress e
SET banned_until = CASE WHEN e.banned_until IS NOT NULL THEN
        clock_timestamp() + greatest(e.ban_wait, make_interval(secs => $2)) END,
    ill_until = CASE WHEN e.ill_until IS NOT NULL THEN
        clock_timestamp() + greatest(e.ill_wait, make_interval(secs => $2)) END
WHERE e.name = $1
    AND greatest(e.banned_until, e.ill_until) <= clock_timestamp()
RETURNING e.ban_episode, e.banned_until, e.ill_until
"""


async def take_probe(session: Session, name: str, at_least: float) -> Probe | None:
    """Take the probe of a closed egress; None if it is not due or another worker has it.

    `at_least`: seconds before anybody else may probe, longer than a probe can take.
    Raises DatabaseLost.
    """
    rows = await session.fetch(_TAKE_PROBE, name, at_least)
    return Probe(*rows[0]) if rows else None


# Put back a probe that sent nothing; what has changed since it was taken stays.
_RETURN_PROBE = """
UPDATE egress e
SET banned_until = CASE
        WHEN e.banned_until = $2 THEN clock_timestamp() ELSE e.banned_until
    END,
    ill_until = CASE WHEN e.ill_until = $3 THEN clock_timestamp() ELSE e.ill_until END
WHERE e.name = $1 AND (e.banned_until = $2 OR e.ill_until = $3)
"""


async def return_probe(session: Session, name: str, probe: Probe) -> None:
    """Make a probe due again, but for a wait that has begun since it was taken.

    Raises DatabaseLost.
    """
    await session.fetch(_RETURN_PROBE, name, probe.banned_until, probe.ill_until)


# A probe was answered by a ban: wait twice as long. An answer is no illness.
_PROBE_BANNED = """
UPDATE egress e
SET ban_wait = least(
        coalesce(e.ban_wait * 2, make_interval(secs => $2)), make_interval(secs => $3)),
    banned_until = clock_timestamp() + $4 * least(
        coalesce(e.ban_wait * 2, make_interval(secs => $2)), make_interval(secs => $3)),
    ban_episode = e.ban_episode + (e.banned_until IS NULL)::integer,
    ill_until = NULL,
    ill_wait = NULL
WHERE e.name = $1
    AND e.ban_episode = $5
    AND e.banned_until IS NOT DISTINCT FROM $6
    AND (e.banned_until IS NOT NULL OR e.ill_until IS NOT NULL)
RETURNING e.ban_episode, e.banned_until
"""


async def probe_banned(
    session: Session, name: str, probe: Probe, first: float, most: float, jitter: float
) -> Record | None:
    """Go on waiting for a ban to end, unless another probe was taken, or traffic has resumed.

    Returns the episode. Raises DatabaseLost.
    """
    rows = await session.fetch(
        _PROBE_BANNED, name, first, most, jitter, probe.ban_episode, probe.banned_until
    )
    return rows[0] if rows else None


# A probe brought no answer: wait again, for an ill provider twice as long if it is in doubt; what
# has changed since it was taken stays.
_PROBE_UNANSWERED = """
UPDATE egress e
SET banned_until = clock_timestamp() + e.ban_wait * $4,
    ill_wait = next.ill_wait,
    ill_until = clock_timestamp() + next.ill_wait
FROM (
    SELECT CASE WHEN i.ill_wait IS NOT NULL THEN
        least(i.ill_wait * CASE WHEN $2 THEN 2 ELSE 1 END, make_interval(secs => $3)) END
    FROM egress i
    WHERE i.name = $1
) AS next (ill_wait)
WHERE e.name = $1
    AND e.banned_until IS NOT DISTINCT FROM $5
    AND e.ill_until IS NOT DISTINCT FROM $6
"""


async def probe_unanswered(
    session: Session, name: str, probe: Probe, *, doubt: bool, jitter: float
) -> None:
    """Arm the next probe after one that never left or is in doubt, unless another was taken.

    Raises DatabaseLost.
    """
    await session.fetch(
        _PROBE_UNANSWERED, name, doubt, ILL_MOST, jitter, probe.banned_until, probe.ill_until
    )


# Let traffic resume after a probe of this episode; wake all workers.
_RESUME = """
WITH resumed AS (
    UPDATE egress e
    SET banned_until = NULL, ban_wait = NULL, ill_until = NULL, ill_wait = NULL
    WHERE e.name = $1
        AND e.ban_episode = $2
        AND e.banned_until IS NOT DISTINCT FROM $3
        AND (e.banned_until IS NOT NULL OR e.ill_until IS NOT NULL)
    RETURNING e.name
)
SELECT resumed.*, pg_notify('dispatcher', 'open:' || $1) FROM resumed
"""


async def resume(session: Session, name: str, probe: Probe) -> bool:
    """Open an egress, unless a ban has begun since its probe or it was probed again.

    Tells whether it did so. Raises DatabaseLost.
    """
    return bool(await session.fetch(_RESUME, name, probe.ban_episode, probe.banned_until))
