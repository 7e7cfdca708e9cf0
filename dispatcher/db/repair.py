"""What an operator does by hand: try again, cancel, settle what is in doubt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
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


# Mark as sent what is in doubt.
_SENT: Final = """
UPDATE outbox o
SET status = 'accepted',
    status_at = clock_timestamp(),
    accepted_at = clock_timestamp(),
    retry_at = NULL,
    error = NULL,
    worker_id = NULL
WHERE o.id = ANY ($1::bigint[]) AND o.status = 'unknown'
"""

# Send again: without a worker, no late answer can touch the message any more; without a
# recipient, its number is read again, for it may have been put right.
_AGAIN: Final = """
UPDATE outbox o
SET status = 'pending',
    status_at = CASE WHEN o.status = 'pending' THEN o.status_at ELSE clock_timestamp() END,
    retry_at = NULL,
    failures = 0,
    error = NULL,
    recipient = NULL,
    worker_id = CASE WHEN o.status = 'pending' THEN o.worker_id END
WHERE o.id = ANY ($1::bigint[]) AND o.status IN ('unknown', 'rejected', 'expired', 'pending')
"""

# Never send; an answer that comes late is still recorded.
_CANCEL: Final = """
UPDATE outbox o
SET status = 'cancelled', status_at = clock_timestamp()
WHERE o.id = ANY ($1::bigint[]) AND o.status = 'pending'
"""


class Action(Enum):
    """What can be done by hand: from which statuses, how, and whom it wakes."""

    MARK_SENT = ((Status.UNKNOWN,), _SENT, None)
    SEND_AGAIN = ((Status.UNKNOWN,), _AGAIN, "outbox")
    RETRY = ((Status.REJECTED, Status.EXPIRED, Status.PENDING), _AGAIN, "outbox")
    CANCEL = ((Status.PENDING,), _CANCEL, "cancel")

    def __init__(self, statuses: tuple[Status, ...], change: str, wakes: str | None) -> None:
        self.statuses = statuses
        self.change = change
        self.wakes = wakes

    @property
    def sends(self) -> bool:
        """Whether the message is to go out after it."""
        return self.wakes == "outbox"


# Count the chosen messages by their status; of the waiting only those that wait for retry_at, if
# $6 says so.
_COUNT: Final = """
SELECT o.status, count(*) AS messages
FROM outbox o
WHERE o.status = ANY ($1::text[])
    AND ($2::bigint[] IS NULL OR o.id = ANY ($2))
    AND ($3::bigint IS NULL OR o.service_id = $3)
    AND ($4::text IS NULL OR o.batch = $4)
    AND ($5::interval IS NULL OR o.status_at <= clock_timestamp() - $5::interval)
    AND (NOT $6 OR o.status <> 'pending' OR o.retry_at > clock_timestamp())
GROUP BY o.status
"""

# Lock the next of the chosen messages; tell who may still hold each, and whether it is too late.
_PICK: Final = """
SELECT
    o.id,
    (
        SELECT w.id FROM worker w WHERE w.id = o.worker_id AND w.lease_until > clock_timestamp()
    ) AS held_by,
    coalesce(o.expires_at <= clock_timestamp(), false) AS too_late
FROM outbox o
WHERE o.status = ANY ($1::text[])
    AND ($2::bigint[] IS NULL OR o.id = ANY ($2))
    AND ($3::bigint IS NULL OR o.service_id = $3)
    AND ($4::text IS NULL OR o.batch = $4)
    AND ($5::interval IS NULL OR o.status_at <= clock_timestamp() - $5::interval)
    AND (NOT $6 OR o.status <> 'pending' OR o.retry_at > clock_timestamp())
    AND o.id > $7
ORDER BY o.id
LIMIT $8
FOR NO KEY UPDATE OF o
"""

# Wake the workers.
_WAKE: Final = "SELECT pg_notify('dispatcher', $1)"

# Plans made for all values alike could not use the indexes that a filter allows.
_PLAN: Final = "SET plan_cache_mode = force_custom_plan"

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


def _filter(choice: Choice) -> list[object]:
    return [choice.ids, choice.service_id, choice.batch, choice.older_than]


async def count(session: Session, action: Action, choice: Choice) -> dict[Status, int]:
    """How many of the chosen messages an action is for, by status. Raises DatabaseLost."""
    await session.script(_PLAN)
    statuses = [status.value for status in action.statuses]
    rows = await session.fetch(_COUNT, statuses, *_filter(choice), action is Action.RETRY)
    return {Status(row["status"]): row["messages"] for row in rows}


@dataclass(frozen=True, slots=True)
class Step:
    """What was done in one transaction."""

    changed: list[int]
    held: list[tuple[int, int]]
    """Messages that were let be, each with the worker that may still hold it."""
    too_late: list[int]
    """Messages that were let be because their `expires_at` has passed."""


async def act(session: Session, action: Action, choice: Choice) -> AsyncIterator[Step]:
    """Do something to the chosen messages, step by step. Raises DatabaseLost."""
    await session.script(_PLAN)
    statuses = [status.value for status in action.statuses]
    after = -(2**63)
    while True:
        step = Step([], [], [])
        async with session.transaction() as connection:
            rows = await connection.fetch(
                _PICK, statuses, *_filter(choice), action is Action.RETRY, after, BATCH
            )
            for row in rows:
                if row["held_by"] is not None and action is not Action.CANCEL:
                    step.held.append((row["id"], row["held_by"]))
                elif row["too_late"] and action.sends:
                    step.too_late.append(row["id"])
                else:
                    step.changed.append(row["id"])
            if step.changed:
                await connection.execute(action.change, step.changed)
                if action.wakes is not None:
                    await connection.fetch(_WAKE, action.wakes)
        if not rows:
            return
        after = rows[-1]["id"]
        yield step


async def doubts(session: Session, choice: Choice) -> list[Record]:
    """The chosen messages in doubt, the oldest first. Raises DatabaseLost."""
    return await session.fetch(_DOUBTS, *_filter(choice))


async def statuses_of(session: Session, ids: Sequence[int]) -> dict[int, Status]:
    """The statuses of those messages that exist. Raises DatabaseLost."""
    rows = await session.fetch(_STATUSES, list(ids))
    return {row["id"]: Status(row["status"]) for row in rows}
