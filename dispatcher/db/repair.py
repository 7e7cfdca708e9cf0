"""What an operator does by hand: try again, cancel, settle what is in doubt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Final

from asyncpg import Record

from dispatcher.db.pool import Session
from dispatcher.domain.message import Status

BATCH: Final = 1000
"""Messages that are changed in one transaction."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which messages are meant: those that fit all that is given."""

    ids: Sequence[int] | None = None
    service_id: int | None = None
    batch: str | None = None
    older_than: timedelta | None = None
    """Least time in their present status."""

    @property
    def everything(self) -> bool:
        """Whether nothing is given."""
        return self == Choice()


# Lock those of the messages in $1 that still have one of the statuses in $2; tell who may hold
# each, and whether it is too late.
_LOCKED: Final = """
locked AS MATERIALIZED (
    SELECT
        o.id, o.status,
        (
            SELECT w.id
            FROM worker w
            WHERE w.id = o.worker_id AND w.lease_until > clock_timestamp()
        ) AS held_by,
        coalesce(o.expires_at <= clock_timestamp(), false) AS too_late
    FROM outbox o
    WHERE o.id = ANY ($1::bigint[]) AND o.status = ANY ($2::text[])
    ORDER BY o.id
    FOR NO KEY UPDATE OF o
)
"""

# Mark as sent what is in doubt.
_SENT: Final = f"""
WITH {_LOCKED},
changed AS (
    UPDATE outbox o
    SET status = 'accepted',
        status_at = statement_timestamp(),
        accepted_at = statement_timestamp(),
        retry_at = NULL,
        error = NULL,
        worker_id = NULL
    FROM locked l
    WHERE o.id = l.id AND l.held_by IS NULL
    RETURNING o.id
)
SELECT l.id, l.status, l.held_by, l.too_late, c.id IS NOT NULL AS changed
FROM locked l
LEFT JOIN changed c USING (id)
ORDER BY l.id
"""  # noqa: S608 - of constants only

# Send again: without a worker, no late answer can touch the message any more; without a
# recipient, its number is read again, for it may have been put right.
_AGAIN: Final = f"""
WITH {_LOCKED},
changed AS (
    UPDATE outbox o
    SET status = 'pending',
        status_at = CASE WHEN o.status = 'pending' THEN o.status_at ELSE clock_timestamp() END,
        retry_at = NULL,
        failures = 0,
        error = NULL,
        recipient = NULL,
        cancel = false,
        worker_id = CASE WHEN o.status = 'pending' THEN o.worker_id END
    FROM locked l
    WHERE o.id = l.id AND l.held_by IS NULL AND NOT l.too_late
    RETURNING o.id
),
woken AS MATERIALIZED (
    SELECT pg_notify('dispatcher', 'outbox') FROM (SELECT FROM changed LIMIT 1) any_changed
)
SELECT l.id, l.status, l.held_by, l.too_late, c.id IS NOT NULL AS changed
FROM locked l
LEFT JOIN changed c USING (id)
LEFT JOIN woken ON true
ORDER BY l.id
"""  # noqa: S608 - of constants only

# Never send: what waits ends here, what is claimed ends when its worker gives it back, and what is
# in doubt is not sent again by itself. An answer that comes late is still recorded.
_CANCEL: Final = f"""
WITH {_LOCKED},
changed AS (
    UPDATE outbox o
    SET status = CASE WHEN o.status = 'pending' THEN 'cancelled' ELSE o.status END,
        status_at = CASE WHEN o.status = 'pending' THEN clock_timestamp() ELSE o.status_at END,
        cancel = true
    FROM locked l
    WHERE o.id = l.id
    RETURNING o.id, o.status
),
recalled AS MATERIALIZED (
    SELECT pg_notify('dispatcher', 'cancel')
    FROM (SELECT FROM changed WHERE status = 'sending' LIMIT 1) any_sending
)
SELECT l.id, l.status, l.held_by, l.too_late, true AS changed
FROM locked l
LEFT JOIN recalled ON true
ORDER BY l.id
"""  # noqa: S608 - of constants only


class Action(Enum):
    """What can be done by hand: from which statuses, and how."""

    MARK_SENT = ((Status.UNKNOWN,), _SENT)
    SEND_AGAIN = ((Status.UNKNOWN,), _AGAIN)
    RETRY = ((Status.REJECTED, Status.EXPIRED, Status.PENDING), _AGAIN)
    CANCEL = ((Status.PENDING, Status.SENDING, Status.UNKNOWN), _CANCEL)

    def __init__(self, statuses: tuple[Status, ...], change: str) -> None:
        self.statuses = statuses
        self.change = change


# Find the chosen messages, in the order in which they would be claimed; of the waiting only those
# that wait for retry_at, if $6 says so.
_CHOOSE: Final = """
SELECT
    o.status,
    array_agg(o.id ORDER BY o.priority DESC, greatest(o.send_after, o.retry_at), o.id) AS ids
FROM outbox o
WHERE o.status = ANY ($1::text[])
    AND ($2::bigint[] IS NULL OR o.id = ANY ($2))
    AND ($3::bigint IS NULL OR o.service_id = $3)
    AND ($4::text IS NULL OR o.batch = $4)
    AND ($5::interval IS NULL OR o.status_at <= clock_timestamp() - $5::interval)
    AND (NOT $6 OR o.status <> 'pending' OR o.retry_at > clock_timestamp())
GROUP BY o.status
"""

# List what is in doubt, the oldest first, with the worker that may still hold it.
_DOUBTS: Final = """
SELECT
    o.id, o.service_id, coalesce(o.recipient, o.msisdn) AS msisdn, o.batch, o.status_at,
    o.attempts, o.reply, o.error, w.id AS held_by, s.on_unknown
FROM outbox o
JOIN service s USING (service_id)
LEFT JOIN worker w ON w.id = o.worker_id AND w.lease_until > clock_timestamp()
WHERE o.status = 'unknown'
    AND ($1::bigint[] IS NULL OR o.id = ANY ($1))
    AND ($2::bigint IS NULL OR o.service_id = $2)
    AND ($3::text IS NULL OR o.batch = $3)
    AND ($4::interval IS NULL OR o.status_at <= clock_timestamp() - $4::interval)
ORDER BY o.status_at, o.id
"""

# Tell the statuses of messages.
_STATUSES: Final = "SELECT o.id, o.status FROM outbox o WHERE o.id = ANY ($1::bigint[])"


def _values(statuses: Iterable[Status]) -> list[str]:
    return [status.value for status in statuses]


def _filter(choice: Choice) -> list[object]:
    return [choice.ids, choice.service_id, choice.batch, choice.older_than]


async def choose(session: Session, action: Action, choice: Choice) -> dict[Status, list[int]]:
    """The messages that an action is for, by status, those first that go first.

    Raises DatabaseLost.
    """
    rows = await session.fetch(
        _CHOOSE, _values(action.statuses), *_filter(choice), action is Action.RETRY
    )
    return {Status(row["status"]): row["ids"] for row in rows}


@dataclass(frozen=True, slots=True)
class Step:
    """What was done in one transaction."""

    changed: dict[int, Status]
    """Messages that were changed, each with its status before."""
    held: list[tuple[int, int]]
    """Messages that were let be, each with the worker that may still hold it."""
    too_late: list[int]
    """Messages that were let be because their `expires_at` has passed."""


async def act(session: Session, action: Action, ids: Sequence[int]) -> AsyncGenerator[Step, None]:
    """Do something to messages, step by step in their order. Raises DatabaseLost."""
    for start in range(0, len(ids), BATCH):
        step = Step({}, [], [])
        for row in await session.fetch(
            action.change, ids[start : start + BATCH], _values(action.statuses)
        ):
            if row["changed"]:
                step.changed[row["id"]] = Status(row["status"])
            elif row["held_by"] is not None:
                step.held.append((row["id"], row["held_by"]))
            else:
                step.too_late.append(row["id"])
        yield step


async def doubts(session: Session, choice: Choice) -> list[Record]:
    """The chosen messages in doubt, the oldest first. Raises DatabaseLost."""
    return await session.fetch(_DOUBTS, *_filter(choice))


async def statuses_of(session: Session, ids: Sequence[int]) -> dict[int, Status]:
    """The statuses of those messages that exist. Raises DatabaseLost."""
    rows = await session.fetch(_STATUSES, list(ids))
    return {row["id"]: Status(row["status"]) for row in rows}
