"""Delivery reports on their way in: stored in batches, and applied when their message is known."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from typing import Any, Final

import structlog

from dispatcher.db import reports
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.db.refusal import Refused, refusals
from dispatcher.db.reports import Applied, Report
from dispatcher.domain.message import Status
from dispatcher.domain.reports import advance, tellable
from dispatcher.metrics import Metrics

STATEMENT: Final = 5.0
"""Seconds that a statement may take before the database counts as away."""

QUEUE: Final = 5000
"""Reports that may wait to be stored."""

BATCH: Final = 500
"""Reports stored by one statement at most."""

CROWD: Final = 8
GATHER: Final = 0.03
"""After more than `CROWD` reports at once the next have these seconds to gather, or until as many
are there again: a statement by itself costs the database as much as thirty reports in it."""

AGAIN: Final = 0.5
"""Seconds between two tries while the database is away."""

LOOK: Final = 0.5
"""Seconds between two looks at reports that wait for their message."""

REST: Final = 0.2
SHARE: Final = 20
"""Between two looks are at least `REST` seconds, and `SHARE` times as long as the last one took,
but no more than `LOOK`; however often identifiers are recorded."""

YOUNG: Final = 900.0
OLD: Final = 604_800.0
"""Ages, in seconds, up to which reports that wait are looked at: always, and from time to time."""

DEEP: Final = 300.0
"""Seconds between two looks at all that waits: an answer may come late, out of a spool."""

log = structlog.stdlib.get_logger()


class Stored(Enum):
    """What became of a report that was put."""

    YES = auto()
    """It is durable."""
    AWAY = auto()
    """The database is away; whether it was stored is not known."""
    FULL = auto()
    """Too many wait."""


@dataclass(slots=True)
class _Waiting:
    """A report that waits to be stored, and what tells who waits for that."""

    report: Report
    word: str
    done: asyncio.Future[Stored] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, stored: Stored) -> None:
        if not self.done.done():  # it is, where the request was cancelled
            self.done.set_result(stored)


class Intake:
    """Stores reports in batches, and looks at those that came before their message was known."""

    def __init__(self, dsn: str, metrics: Metrics) -> None:
        self._storing = Session(dsn, name="dispatcher reports", timeout=STATEMENT)
        self._applying = Session(dsn, name="dispatcher late reports", timeout=STATEMENT)
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._more = asyncio.Event()
        self._as_many = asyncio.Event()
        self._last_batch = 0
        self._look_now = asyncio.Event()
        self._closing = asyncio.Event()
        self._away = True
        """Whether the database is away, for all that is known."""
        self._sweep: tuple[float, datetime | None] | None = None
        """A look beyond the newest reports: their age in seconds, and how far it has come."""
        self._deep_at = 0.0

    async def put(self, report: Report, word: str) -> Stored:
        """Store a report, told by a word of the provider; returns when it is durable or refused."""
        if self._away:
            return Stored.AWAY
        if len(self._queue) >= QUEUE:
            return Stored.FULL
        waiting = _Waiting(report, word)
        self._queue.append(waiting)
        self._more.set()
        if len(self._queue) >= self._last_batch:
            self._as_many.set()
        return await waiting.done

    def look(self) -> None:
        """Say that reports that wait may find their message now."""
        self._look_now.set()

    def close(self) -> None:
        """End `run` and `store` once all that was put is stored or refused."""
        self._closing.set()
        self._more.set()
        self._as_many.set()

    async def release(self) -> None:
        """Close the connections."""
        await self._storing.close()
        await self._applying.close()

    async def run(self) -> None:
        """Store and apply, until closed."""
        async with asyncio.TaskGroup() as group:
            applying = group.create_task(self._apply())
            await self.store()
            applying.cancel()

    async def store(self) -> None:
        """Store what is put, until closed. Several may do so at once."""
        await self._reach()
        while True:
            await self._more.wait()
            if not self._queue:
                if self._closing.is_set():
                    return
                self._more.clear()
                continue
            if self._last_batch > CROWD:
                await _came(self._as_many, GATHER)
            self._as_many.clear()
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            try:
                with refusals():
                    stored = await reports.receive(self._storing, [w.report for w in batch])
            except (DatabaseLost, Refused) as error:
                self._turn_away(batch)
                await self._recover(error)
                await self._reach()
                continue
            except asyncio.CancelledError:
                self._queue.extendleft(reversed(batch))
                raise
            self._last_batch = len(batch)
            for waiting in batch:
                waiting.settle(Stored.YES)
            self._tell("report.received", stored, [waiting.word for waiting in batch])
            if any(report.message_id is None for report in stored):
                self._look_now.set()

    def _turn_away(self, batch: list[_Waiting]) -> None:
        self._away = True
        for waiting in (*batch, *self._queue):
            waiting.settle(Stored.AWAY)
        self._queue.clear()

    async def _recover(self, error: DatabaseLost | Refused) -> None:
        """Say what no waiting mends, a missing right for one; and wait before the next try."""
        if isinstance(error, Refused):
            log.error("report.failed", reason=str(error))
        await _came(self._closing, AGAIN)

    async def _reach(self) -> None:
        """Wait until the database can be reached, or this is closed."""
        while self._away and not self._closing.is_set():
            try:
                await self._storing.fetch("SELECT")
                self._away = False
            except DatabaseLost:
                await _came(self._closing, AGAIN)

    async def _apply(self) -> None:
        """Look at reports that wait, while there are any and when told to."""
        clock = asyncio.get_running_loop().time
        while True:
            self._look_now.clear()
            began = clock()
            try:
                with refusals():
                    again = await self._round(began)
            except (DatabaseLost, Refused) as error:
                await self._recover(error)
                again = True
            took = clock() - began
            await asyncio.sleep(min(LOOK, max(REST, SHARE * took)))
            await _came(self._look_now, LOOK if again else self._deep_at - clock())

    async def _round(self, now: float) -> bool:
        """Look once; tells whether to look again soon."""
        newest = await reports.apply(self._applying, YOUNG)
        self._tell("report.applied", newest.applied)
        if now >= self._deep_at:
            self._deep_at = now + DEEP
            self._sweep = OLD, None
        elif self._sweep is None and newest.oldest is not None:
            self._sweep = YOUNG, newest.oldest
        if self._sweep is not None:
            within, until = self._sweep
            further = await reports.apply(self._applying, within, until)
            self._tell("report.applied", further.applied)
            self._sweep = None if further.oldest is None else (within, further.oldest)
        return newest.waiting > 0 or self._sweep is not None

    def _tell(
        self, event: str, applied: Sequence[Applied], words: Sequence[str] | None = None
    ) -> None:
        """Log and count reports; those of one message are in the order in which they came."""
        stands: dict[int, Status] = {}
        for place, report in enumerate(applied):
            message, status = report.message_id, report.status
            late, stand = False, None
            if message is not None and report.before is not None:
                before = stands.get(message, report.before)
                stand = stands[message] = before if status is None else advance(before, status)
                late = status is not None and stand is before
                if stand is Status.DELIVERED and not late and report.since_accepted is not None:
                    self._metrics.accepted_to_delivered(max(0.0, report.since_accepted))
            told: dict[str, Any] = {
                "id": message,
                "provider_id": report.provider_id,
                "status": status,
                "late": late,
                "message_status": stand,
            }
            if words is None:
                told["waited"] = round(report.waited, 3)
            else:
                told["word"] = tellable(words[place])
                self._metrics.report(status, matched=message is not None)
            log.info(event, **told)


async def _came(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event; tells whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
