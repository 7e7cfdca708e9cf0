"""Recording: results go back to the outbox in batches, and none is lost while the database is away.

The number of results that wait is bounded by what the worker may hold.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import structlog

from dispatcher import clock, logs
from dispatcher.breaker import Breaker, Settled
from dispatcher.db import outbox
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.domain.message import Status
from dispatcher.domain.msisdn import masked
from dispatcher.domain.outcomes import tellable
from dispatcher.metrics import NOT_SENT, Metrics

LINGER: Final = 0.01
"""Seconds that a result waits for others to be recorded with it."""

AT_ONCE: Final = 0.6
"""Results, as a share of the worker's places, that wait for no more: it holds no more than twice
its places, so those that wait keep others from being claimed."""

TOGETHER: Final = 0.9
"""Results, as a share of the places, that one statement records at most, for the same reason."""

BATCH: Final = 500
"""Results that one statement records at most, whatever the places."""

AGAIN: Final = 0.25
"""Seconds between two tries while the database is away."""

EVENTS: Final = {
    Status.ACCEPTED: "message.accepted",
    Status.REJECTED: "message.rejected",
    Status.UNKNOWN: "message.unknown",
    Status.PENDING: "message.retry",
    Status.EXPIRED: "message.expired",
}

log = structlog.stdlib.get_logger()


class Recorder:
    """Writes results back, each once, in the order they came."""

    def __init__(
        self,
        session: Session,
        worker_id: int,
        breaker: Breaker,
        metrics: Metrics,
        *,
        places: int,
        released: Callable[[Settled], None],
        accepted: Callable[[], None],
        database: Callable[[str | None], None],
    ) -> None:
        """Prepare to record for one worker.

        Args:
            session: The connection that is written on.
            worker_id: The worker whose claims these are.
            breaker: Told of each result at once, and to make its conclusions durable.
            metrics: Counts what was recorded.
            places: Requests that the worker has under way at most.
            released: Told of each result that is durable.
            accepted: Told that identifiers were recorded.
            database: Told of each loss of the database (one phrase) and each success (None).
        """
        self._session = session
        self._worker_id = worker_id
        self._breaker = breaker
        self._metrics = metrics
        self._at_once = min(BATCH, max(1, int(places * AT_ONCE)))
        self._together = min(BATCH, max(1, int(places * TOGETHER)))
        self._released = released
        self._accepted = accepted
        # Bound once: the module's own does so for each line, a fifth of what a line costs.
        self._log = log.bind()
        self._database = database
        self._waiting: deque[Settled] = deque()
        self._batch: list[Settled] = []
        self._more = asyncio.Event()
        self._enough = asyncio.Event()
        self._closing = False
        self._oldest: float | None = None
        self.recorded: Counter[Status] = Counter()
        """Outcomes recorded since the start."""

    @property
    def lag(self) -> float:
        """Seconds that the oldest result has waited to be recorded."""
        return 0.0 if self._oldest is None else clock.now() - self._oldest

    def put(self, settled: Settled) -> None:
        """Take a result; what cannot wait takes effect now."""
        self._breaker.learn(settled)
        if self._oldest is None:
            self._oldest = clock.now()
        self._waiting.append(settled)
        self._more.set()
        if len(self._waiting) >= self._at_once:
            self._enough.set()

    def close(self) -> None:
        """End `run` once all that was put is recorded."""
        self._closing = True
        self._more.set()
        self._enough.set()

    async def run(self) -> None:
        """Record until closed."""
        if self._batch:
            await self._write()
        while True:
            await self._more.wait()
            if not self._waiting:
                if self._closing:
                    return
                self._more.clear()
                continue
            if not self._closing and len(self._waiting) < self._at_once:
                await self._linger()
            while self._waiting and len(self._batch) < self._together:
                self._batch.append(self._waiting.popleft())
            await self._write()

    async def _linger(self) -> None:
        self._enough.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                await self._enough.wait()

    def unrecorded(self) -> list[outbox.Result]:
        """What is not known to be recorded, for the spool."""
        return [self._result(settled) for settled in (*self._batch, *self._waiting)]

    async def _write(self) -> None:
        again = applied = False
        while True:
            try:
                if not applied:
                    await self._breaker.apply(self._session, self._batch)
                    applied = True
                written = await outbox.record(
                    self._session, [self._result(settled) for settled in self._batch]
                )
            except DatabaseLost as error:
                # The statement may have taken effect all the same; run again it changes nothing.
                again = True
                self._database(str(error))
                await asyncio.sleep(AGAIN)
                continue
            break
        self._database(None)
        batch, self._batch = self._batch, []
        self._oldest = clock.now() if self._waiting else None
        for settled in batch:
            self._released(settled)
        if any(settled.outcome.provider_id is not None for settled in batch):
            self._accepted()
        try:
            # The worker claims now: what is told takes time that passes while the database works.
            await asyncio.sleep(0)
        finally:
            with logs.lines.together():
                self._tell_all(batch, written, again=again)

    def _tell_all(
        self,
        batch: list[Settled],
        written: Mapping[tuple[int, int], float | None],
        *,
        again: bool,
    ) -> None:
        told: Counter[tuple[int, Status, str]] = Counter()
        for settled in batch:
            key = (settled.message.id, settled.message.claim_no)
            if key in written or again:
                self._tell(settled, written.get(key), told)
            else:
                log.warning(
                    "message.superseded",
                    id=settled.message.id,
                    service_id=settled.message.service_id,
                    reply=_reply(settled),
                    status=settled.outcome.status,
                )
        for (service_id, status, answer), messages in told.items():
            self.recorded[status] += messages
            self._metrics.outcomes(messages, service_id, status.value, answer)

    def _tell(
        self,
        settled: Settled,
        accepted_after: float | None,
        told: Counter[tuple[int, Status, str]],
    ) -> None:
        message, outcome = settled.message, settled.outcome
        if settled.withheld and outcome.status is Status.PENDING:
            return
        told[message.service_id, outcome.status, _answer(settled)] += 1
        if settled.left_at is not None:
            self._metrics.request(settled.seconds)
        if accepted_after is not None:
            self._metrics.insert_to_accepted(accepted_after)
        self._log.info(
            EVENTS[outcome.status],
            id=message.id,
            service_id=message.service_id,
            msisdn=masked(message.msisdn),
            reply=_reply(settled),
            provider_id=outcome.provider_id,
            attempt=message.attempt,
            latency_ms=round(settled.seconds * 1000, 1),
            error=outcome.error,
        )

    def _result(self, settled: Settled) -> outbox.Result:
        return outbox.Result(
            settled.message.id,
            settled.message.claim_no,
            self._worker_id,
            settled.message.service_id,
            settled.outcome,
            settled.retry_in,
            settled.failed,
            None if settled.left_at is None else clock.now() - settled.left_at,
            settled.seconds,
        )


def _reply(settled: Settled) -> str | None:
    # What was understood has been looked at: it is one of the table's.
    reply = settled.outcome.reply
    return reply if settled.answered else tellable(reply, settled.message.text)


def _answer(settled: Settled) -> str:
    if settled.withheld:
        return NOT_SENT
    if settled.answered:
        return (settled.outcome.reply or "").partition(":")[0]
    return "in doubt" if settled.outcome.in_doubt else "never left"
