"""What nobody else sees to: rows of workers that are gone, what ran out, what goes again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from dispatcher import clock
from dispatcher.db import outbox, workers
from dispatcher.db.pool import DatabaseLost, Record, Session
from dispatcher.domain.message import Status
from dispatcher.domain.msisdn import masked
from dispatcher.domain.outcomes import tellable
from dispatcher.metrics import NOT_SENT, Metrics
from dispatcher.recorder import EVENTS
from dispatcher.settings import Settings

ROUND: Final = 2.0
"""Seconds between two rounds at most."""

STILL: Final = 2 / 3
"""Of a lease: a rescuer that stood still for longer, perhaps with the database and all others,
gives them time to beat. A lease that is renewed in time has three quarters left, or more."""

FORGET: Final = 3600.0
"""Seconds between two looks for workers to forget."""

log = structlog.stdlib.get_logger()


class Rescuer:
    """Goes round at the pace that each of its duties needs."""

    def __init__(
        self,
        settings: Settings,
        session: Session,
        metrics: Metrics,
        database: Callable[[str | None], None],
    ) -> None:
        self._settings = settings
        self._session = session
        self._metrics = metrics
        self._database = database
        self._rescue_at = 0.0
        self._stirred_at = clock.now()
        self._retry_at = 0.0
        self._forget_at = 0.0

    def hold_off(self) -> None:
        """The database is or was away: give the others a whole lease to beat again."""
        self._rescue_at = clock.now() + self._settings.lease

    async def run(self) -> None:
        """Go round until cancelled."""
        while True:
            try:
                await self._round()
            except DatabaseLost as error:
                self._database(str(error))
            await asyncio.sleep(min(ROUND, self._settings.lease / 6))

    async def _round(self) -> None:
        for row in await outbox.expire(self._session):
            self._tell(row)
        # Before the rescue: should the database be back, the first to notice must wait too.
        self._database(None)
        now = clock.now()
        if now >= self._retry_at:
            self._retry_at = now + min(5.0, max(0.2, self._settings.unknown_retry_after / 4))
            for row in await outbox.retry_unknown(
                self._session, self._settings.unknown_retry_after
            ):
                self._tell(row)
        await self._rescue_in_time()
        if now >= self._forget_at:
            self._forget_at = now + FORGET
            await workers.forget(self._session)

    async def _rescue_in_time(self) -> None:
        now, before = clock.now(), self._stirred_at
        self._stirred_at = now
        if now - before > self._settings.lease * STILL:
            self.hold_off()
        if now >= self._rescue_at:
            self._rescue_at = now + self._settings.lease / 6
            await self._rescue()

    async def _rescue(self) -> None:
        while rows := await outbox.rescue(self._session):
            self._tell_rescued(rows)

    def _tell_rescued(self, rows: list[Record]) -> None:
        for worker_id, messages in Counter(row["worker_id"] for row in rows).items():
            log.warning("worker.rescued", worker_id=worker_id, messages=messages)
            self._metrics.rescued(messages)
        for row in rows:
            self._tell(row)

    def _tell(self, row: Record) -> None:
        self._metrics.outcomes(1, row["service_id"], row["status"], NOT_SENT)
        log.info(
            EVENTS[Status(row["status"])],
            id=row["id"],
            service_id=row["service_id"],
            msisdn=masked(row["msisdn"]),
            reply=tellable(row["reply"], row["text"]),
            provider_id=None,
            attempt=row["attempts"],
            latency_ms=None,
            error=row["error"],
        )
