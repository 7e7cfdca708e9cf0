"""Putting messages into the outbox: one, or a whole file of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import asyncpg

from dispatcher.db.pool import Session

# Tell the database's time.
_NOW: Final = "SELECT clock_timestamp() AS now"


async def now(session: Session) -> datetime:
    """The database's time. Raises DatabaseLost."""
    found: datetime = (await session.fetch(_NOW))[0]["now"]
    return found


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be put into the outbox; None stands for the table's own default."""

    msisdn: str
    text: str
    extended: bool | None = None
    priority: int | None = None
    send_after: datetime | None = None
    expires_at: datetime | None = None
    dedup_key: str | None = None
    batch: str | None = None


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of a message to be put into the outbox."""

    id: int | None
    """Its id, or that of the one that already has its `dedup_key`; None without a service."""
    new: bool


# Put a message into the outbox, unless its service is unknown or its key is there already.
_ENQUEUE: Final = """
WITH written AS (
    INSERT INTO outbox (
        service_id, msisdn, text, extended, priority, send_after, expires_at, dedup_key, batch)
    SELECT
        s.service_id, $2, $3, coalesce($4, true), coalesce($5, 0), coalesce($6, now()), $7, $8, $9
    FROM service s
    WHERE s.service_id = $1
    ON CONFLICT (service_id, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING
    RETURNING id
)
SELECT w.id, true AS new FROM written w
UNION ALL
SELECT o.id, false FROM outbox o WHERE o.service_id = $1 AND o.dedup_key = $8
"""


async def enqueue(session: Session, service_id: int, message: NewMessage) -> Enqueued:
    """Put one message into the outbox. Raises DatabaseLost."""
    for _ in range(2):
        rows = await session.fetch(
            _ENQUEUE,
            service_id,
            message.msisdn,
            message.text,
            message.extended,
            message.priority,
            message.send_after,
            message.expires_at,
            message.dedup_key,
            message.batch,
        )
        if rows:
            return Enqueued(rows[0]["id"], rows[0]["new"])
        # One who was quicker by less than a statement's snapshot is seen by the next.
    return Enqueued(None, new=False)


# Tell whether a text matches one of a service's patterns, if it has any.
_FITS: Final = """
SELECT s.patterns IS NULL OR EXISTS (
    SELECT FROM unnest(s.patterns) AS pattern WHERE $2 ~ dispatcher_whole_pattern(pattern)
) AS fits
FROM service s
WHERE s.service_id = $1
"""


async def fits(session: Session, service_id: int, text: str) -> bool | None:
    """Whether a text matches the service's patterns; None if there is no such service.

    Raises DatabaseLost.
    """
    rows = await session.fetch(_FITS, service_id, text)
    return rows[0]["fits"] if rows else None


# Tell whether a service is there.
_KNOWN: Final = "SELECT FROM service s WHERE s.service_id = $1"

# Make a table of this transaction's own, for a whole file to be checked before it counts.
_STAGE: Final = """
CREATE TEMPORARY TABLE staged (
    line       integer PRIMARY KEY,
    msisdn     text NOT NULL,
    text       text NOT NULL,
    extended   boolean,
    priority   smallint,
    send_after timestamptz,
    expires_at timestamptz,
    dedup_key  text,
    batch      text
) ON COMMIT DROP
"""

_STAGED: Final = (
    "line",
    "msisdn",
    "text",
    "extended",
    "priority",
    "send_after",
    "expires_at",
    "dedup_key",
    "batch",
)

# Find the lines whose text matches none of the service's patterns.
_MISFITS: Final = """
SELECT s.line, 'the text matches none of the service''s patterns' AS reason,
    count(*) OVER () AS count
FROM service v
CROSS JOIN staged s
WHERE v.service_id = $2
    AND v.patterns IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM unnest(v.patterns) AS pattern
        WHERE s.text ~ dispatcher_whole_pattern(pattern)
    )
ORDER BY s.line
LIMIT $1
"""

# Find the lines whose key stands in an earlier line.
_DOUBLED: Final = """
SELECT d.line, format('its dedup_key stands in line %s already', d.first) AS reason,
    count(*) OVER () AS count
FROM (
    SELECT s.line, min(s.line) OVER (PARTITION BY s.dedup_key) AS first
    FROM staged s
    WHERE s.dedup_key IS NOT NULL
) d
WHERE d.line <> d.first
ORDER BY d.line
LIMIT $1
"""

# Find the lines whose key the service has already.
_KNOWN_KEYS: Final = """
SELECT s.line, format('message %s has its dedup_key already', o.id) AS reason,
    count(*) OVER () AS count
FROM staged s
JOIN outbox o ON o.service_id = $2 AND o.dedup_key = s.dedup_key
ORDER BY s.line
LIMIT $1
"""

# Put the lines from $2 to $3 into the outbox.
_WRITE: Final = """
WITH written AS (
    INSERT INTO outbox (
        service_id, msisdn, text, extended, priority, send_after, expires_at, dedup_key, batch)
    SELECT
        $1, s.msisdn, s.text, coalesce(s.extended, true), coalesce(s.priority, 0),
        coalesce(s.send_after, now()), s.expires_at, s.dedup_key, s.batch
    FROM staged s
    WHERE s.line BETWEEN $2 AND $3
    ORDER BY s.line
    RETURNING id
)
SELECT count(*) AS count, min(w.id) AS first, max(w.id) AS last FROM written w
"""


@dataclass(frozen=True, slots=True)
class Objection:
    """Lines that the database objects to: the first of them with a reason, and how many."""

    lines: list[tuple[int, str]]
    count: int


@dataclass(frozen=True, slots=True)
class Written:
    """Messages put into the outbox: how many, and their first and last id."""

    count: int
    first: int | None
    last: int | None


class Staging:
    """The messages of one file on their way into the outbox, all or nothing."""

    def __init__(self, connection: asyncpg.Connection, service_id: int) -> None:
        self._connection = connection
        self._service_id = service_id

    async def add(self, messages: Sequence[tuple[int, NewMessage]]) -> None:
        """Take messages, each with its line."""
        await self._connection.copy_records_to_table(
            "staged",
            columns=_STAGED,
            records=[
                (
                    line,
                    m.msisdn,
                    m.text,
                    m.extended,
                    m.priority,
                    m.send_after,
                    m.expires_at,
                    m.dedup_key,
                    m.batch,
                )
                for line, m in messages
            ],
        )

    async def objections(self, limit: int) -> list[Objection]:
        """What the database has against the messages, at most so many lines of each kind."""
        await self._connection.execute("ANALYZE staged")
        found = []
        for check, *of in (
            (_MISFITS, self._service_id),
            (_DOUBLED,),
            (_KNOWN_KEYS, self._service_id),
        ):
            rows = await self._connection.fetch(check, limit, *of)
            if rows:
                lines = [(row["line"], row["reason"]) for row in rows]
                found.append(Objection(lines, rows[0]["count"]))
        return found

    async def write(self, first_line: int, last_line: int) -> Written:
        """Put a range of lines into the outbox."""
        rows = await self._connection.fetch(_WRITE, self._service_id, first_line, last_line)
        return Written(*rows[0])


@asynccontextmanager
async def staging(session: Session, service_id: int) -> AsyncIterator[Staging | None]:
    """One transaction for a whole file; None without a service. Raises DatabaseLost."""
    async with session.transaction() as connection:
        if not await connection.fetch(_KNOWN, service_id):
            yield None
            return
        await connection.execute(_STAGE)
        yield Staging(connection, service_id)
