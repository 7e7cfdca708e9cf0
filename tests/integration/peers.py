"""Workers as the database sees them: each with a session of its own and a lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, time, timedelta
from typing import Final, TypeAlias, TypeVar

import asyncpg

from dispatcher.db import outbox, quota, workers
from dispatcher.db.pool import Record, Session
from dispatcher.domain.outcomes import Outcome, classify
from tests.builders import SERVICE

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
T = TypeVar("T")

PATIENCE: Final = 30.0
"""Seconds after which a condition is taken never to come; no test passes by it."""


class Peer:
    """One worker: claims and records as a worker does, and nothing by itself."""

    def __init__(self, session: Session, worker_id: int, egress: str) -> None:
        self.session = session
        self.worker_id = worker_id
        self.egress = egress

    async def claim(
        self, places: int | Mapping[int, int] = 10, *, egress: bool = False, service: bool = False
    ) -> outbox.Claim:
        """Open the windows and claim; `egress` and `service` as probes of what is closed."""
        asked = {SERVICE: places} if isinstance(places, int) else places
        await quota.open_windows(self.session, list(asked))
        return await outbox.claim(
            self.session, self.worker_id, asked, probe_egress=egress, probe_service=service
        )

    async def ids(self, places: int | Mapping[int, int] = 10) -> list[int]:
        """Claim, and tell which messages are to be sent, in their order."""
        return [row["id"] for row in (await self.claim(places)).sending]

    async def waiting(self) -> list[outbox.Waiting]:
        """The services that have something to send."""
        return await outbox.waiting(self.session, self.egress)

    def result(
        self,
        row: Record,
        outcome: Outcome | bytes = b"MSG_OK:x1",
        *,
        retry_in: float | None = None,
        failed: bool = False,
    ) -> outbox.Result:
        """What became of a claimed message; bytes are an answer with HTTP status 200."""
        left = isinstance(outcome, bytes) or outcome.in_doubt
        return outbox.Result(
            row["id"],
            row["claim_no"],
            self.worker_id,
            row["service_id"],
            classify(200, outcome) if isinstance(outcome, bytes) else outcome,
            retry_in,
            failed,
            sent_ago=0.1 if left else None,
            seconds=0.05 if left else 0.0,
        )

    async def record(
        self,
        rows: Sequence[Record],
        outcome: Outcome | bytes = b"MSG_OK:x1",
        *,
        retry_in: float | None = None,
        failed: bool = False,
    ) -> dict[tuple[int, int], float | None]:
        """Record the same for all these claims."""
        results = [self.result(row, outcome, retry_in=retry_in, failed=failed) for row in rows]
        return await outbox.record(self.session, results)


@asynccontextmanager
async def peer(dsn: str, *, egress: str = "default", lease: float = 300) -> AsyncIterator[Peer]:
    """A worker that has entered itself, with a lease in seconds."""
    async with Session(dsn, name="test", timeout=30) as session:
        worker_id = await workers.enter(
            session, egress, host="test", pid=1, version="0", lease=lease
        )
        yield Peer(session, worker_id, egress)


async def wait_for(condition: Callable[[], Awaitable[T | None]], what: str) -> T:
    """Look until the condition is true and return it; fails, saying what never came."""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                if found := await condition():
                    return found
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"it never came: {what}") from None


def zone_where(weekday: int, clock: time) -> str:
    """A time zone, as PostgreSQL takes it, in which it is such a weekday (Monday is 0) and time.

    PostgreSQL takes fixed offsets of almost a week, so the end of a day or of an ISO week can be
    made to come whenever a test wants it.
    """
    now = datetime.now(UTC).replace(tzinfo=None)
    wanted = datetime.combine(now.date() + timedelta(days=weekday - now.weekday()), clock)
    west = round((now - wanted).total_seconds())
    hours, rest = divmod(abs(west), 3600)
    return f"<X>{'-' if west < 0 else '+'}{hours:02}:{rest // 60:02}:{rest % 60:02}"


def midweek() -> str:
    """A time zone in which no window ends soon: it is the noon of a Wednesday there."""
    return zone_where(2, time(12))


async def message(connection: Connection, message_id: int) -> asyncpg.Record:
    """One row of the outbox."""
    row = await connection.fetchrow("SELECT * FROM outbox WHERE id = $1", message_id)
    assert row is not None
    return row


async def statuses(connection: Connection) -> dict[str, int]:
    """How many messages there are of each status."""
    rows = await connection.fetch("SELECT status, count(*) FROM outbox GROUP BY status")
    return {row["status"]: row["count"] for row in rows}


async def used(connection: Connection, service_id: int = SERVICE) -> tuple[int, ...]:
    """What a service has used of its present day, week and month."""
    rows = await connection.fetch(
        """
        SELECT coalesce(q.used, 0) AS used
        FROM service s
        CROSS JOIN unnest(ARRAY['day', 'week', 'month']) WITH ORDINALITY AS p (period, place)
        LEFT JOIN quota_usage q ON q.service_id = s.service_id AND q.period = p.period
            AND q.window_start = date_trunc(p.period, clock_timestamp(), s.timezone)
        WHERE s.service_id = $1
        ORDER BY p.place
        """,
        service_id,
    )
    return tuple(row["used"] for row in rows)
