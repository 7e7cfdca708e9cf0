"""The worker's loop: looks what waits, and claims as much as there is room for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from dispatcher import clock
from dispatcher.breaker import Breaker
from dispatcher.db import egress, outbox, quota, services, workers
from dispatcher.db.pool import DatabaseClock, DatabaseLost, Record, Session
from dispatcher.domain import outcomes
from dispatcher.domain.message import Message, Probe, Status
from dispatcher.domain.msisdn import masked, normalise
from dispatcher.domain.sharing import share
from dispatcher.lease import Lease
from dispatcher.metrics import NOT_SENT, Metrics
from dispatcher.pacing import Pacer
from dispatcher.provider import Provider
from dispatcher.recorder import EVENTS, Recorder
from dispatcher.sender import Sender
from dispatcher.settings import Settings

LINGER: Final = 0.02
"""Seconds that a few free places wait for more, so that one claim serves them all."""

ENOUGH: Final = 2 / 3
"""Free places, as a share of all, that wait for no more."""

BUSY: Final = 1.0
"""Seconds of unbroken work after which inserts need not wake this worker."""

OVERTAKEN: Final = 1.0
"""Seconds for which claims that go on where the last one ended may pass what was committed late."""

FAILING: Final = 60.0
"""Seconds for which a service is left alone whose rows make the claim fail."""

LOOK_AGAIN: Final = 0.25
"""Seconds between two tries while the database or the lease is lost."""

log = structlog.stdlib.get_logger()


class _Claimed(NamedTuple):
    begun: int
    """Messages that are being sent."""
    kept_back: int
    """Messages that were refused, or whose numbers had to be read first."""


class Worker:
    """Claims messages of all services that may send, fairly, and has them sent."""

    def __init__(  # noqa: PLR0913 - the parts that a message passes through
        self,
        settings: Settings,
        *,
        session: Session,
        pace_session: Session,
        database_clock: DatabaseClock,
        lease: Lease,
        breaker: Breaker,
        provider: Provider,
        metrics: Metrics,
        database: Callable[[str | None], None],
    ) -> None:
        """`database` is told of each loss of the database (a phrase) and each success (None)."""
        self._settings = settings
        self._session = session
        self._pace_session = pace_session
        self._clock = database_clock
        self._lease = lease
        self._breaker = breaker
        self._metrics = metrics
        self._database = database
        self.sender = Sender(
            settings.concurrency,
            lease=lease,
            breaker=breaker,
            provider=provider,
            pacer=Pacer(self._reserve),
            freed=self._freed,
        )
        self._wake = asyncio.Event()
        self._stopping = False
        self._survey_at = 0.0
        self._busy_since: float | None = None
        self._idle = False
        self._egress_stale = True
        self._active: set[int] = set()
        self._probes: set[int] = set()
        self._heads: dict[int, dict[int, outbox.Head]] = {}
        self._later: dict[int, float] = {}
        self._quarantine: dict[int, float] = {}
        self._spent: dict[tuple[int, str], float] = {}
        self._linger_until: float | None = None
        self._reclaim_due = False
        self._reclaim_rescued = False
        self.looked_at = clock.now()
        """When the loop last went round, by our clock."""

    def wake(self, *, egress_changed: bool = False) -> None:
        """Look at the outbox now."""
        self._egress_stale = self._egress_stale or egress_changed
        self._survey_at = 0.0
        self._wake.set()

    def reconcile(self, *, rescued: bool) -> None:
        """Look for claims whose answer was lost, before the next claim.

        `rescued`: others may have found them in doubt meanwhile.
        """
        self._reclaim_due = True
        self._reclaim_rescued = self._reclaim_rescued or rescued
        self._wake.set()

    def stop(self) -> None:
        """Claim nothing more and let nothing leave that has not left."""
        self._stopping = True
        self.sender.stop()
        self._wake.set()

    async def run(self, group: asyncio.TaskGroup, recorder: Recorder) -> None:
        """Claim until told to stop; each message is a task of the group."""
        self.sender.run_in(group, recorder)
        while not self._stopping:
            self.looked_at = clock.now()
            self._wake.clear()
            try:
                again = await self._round() or await self._fall_idle()
                self._database(None)
            except DatabaseLost as error:
                self._database(str(error))
                self._reclaim_due = True
                self._survey_at = 0.0
                again = False
            if not again and not self._stopping:
                await self._rest()

    async def _fall_idle(self) -> bool:
        """Have inserts wake this worker, unless it has been busy; tells whether to look again."""
        now = clock.now()
        if self._active:
            self._busy_since = self._busy_since or now
        else:
            self._busy_since = None
        idle = self._busy_since is None or now - self._busy_since < BUSY
        if idle == self._idle:
            return False
        await workers.set_idle(self._session, self._lease.worker_id, idle=idle)
        self._idle = idle
        # What was inserted just before said nothing.
        self._survey_at = 0.0 if idle else self._survey_at
        return idle

    async def _rest(self) -> None:
        now = clock.now()
        moments = [now + LOOK_AGAIN, *self._later.values()]
        if self._linger_until is not None:
            moments.append(self._linger_until)
        known = (self._survey_at, self._breaker.probe_at, self._breaker.unreachable_until)
        moments += [moment for moment in known if moment is not None and moment > now]
        if self._survey_at > now:
            moments.pop(0)
        try:
            async with asyncio.timeout(max(0.001, min(moments) - now)):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _round(self) -> bool:
        """One look at the outbox; tells whether to look again at once."""
        if not self._lease.valid():
            return False
        if self._reclaim_due:
            await self.release_lost_claims()
        now = clock.now()
        for service in [s for s, at in self._later.items() if at <= now]:
            del self._later[service]
            self._active.add(service)
        if now >= self._survey_at:
            await self._survey()
        if not self._breaker.open:
            self._active.clear()
            return await self._probe_egress()
        for service in list(self._probes):
            self._probes.discard(service)
            if self.sender.free() > 0 and await services.take_probe(
                self._session,
                service,
                self._settings.egress,
                max(self._settings.probe_interval, self._request_at_most()),
            ):
                log.info("service.probing", service_id=service)
                await self._claim_probe(service, probe_service=True)
        return await self._claim_shares()

    def _request_at_most(self) -> float:
        return self._settings.request_timeout + self._settings.lease

    async def _claim_shares(self) -> bool:
        free = self.sender.free()
        unreachable = self._breaker.unreachable_until
        if unreachable is not None:
            if clock.now() < unreachable or self.sender.in_flight:
                return False
            free = min(free, 1)
        if not self._active or free <= 0:
            return False
        enough = max(1, int(self._settings.concurrency * ENOUGH))
        if free < enough and self.sender.held and unreachable is None:
            now = clock.now()
            if self._linger_until is None:
                self._linger_until = now + LINGER
            if now < self._linger_until:
                return False
        self._linger_until = None
        # A service that brings fewer than asked is taken to have no more.
        free = min(free, outbox.AT_MOST)
        asked = share(free, {s: self.sender.held_by_service[s] for s in sorted(self._active)})
        await self._claim(asked)
        return unreachable is None and bool(self._active)

    async def _survey(self) -> None:
        """Learn which services have work, and how the egress stands."""
        self._survey_at = clock.now() + self._settings.poll_interval
        if self._egress_stale or not self._breaker.open:
            self._breaker.know(await egress.state(self._session, self._settings.egress))
            self._egress_stale = False
        found = await self._waiting()
        closed = [w.service_id for w in found if not w.windows_open]
        if closed:
            await quota.open_windows(self._session, closed)
        self._active = {w.service_id for w in found if w.may_send} - self._later.keys()
        self._probes = {w.service_id for w in found if w.probe_due}

    async def _waiting(self) -> list[outbox.Waiting]:
        found = await outbox.waiting(self._session, self._settings.egress)
        self._heads = {w.service_id: w.heads for w in found}
        now = clock.now()
        self._quarantine = {s: at for s, at in self._quarantine.items() if at > now}
        return [w for w in found if w.service_id not in self._quarantine]

    async def _probe_egress(self) -> bool:
        probe_at = self._breaker.probe_at
        if probe_at is None or probe_at > clock.now() or self.sender.free() <= 0:
            return False
        candidates = await self._probe_candidates()
        probe = None
        if candidates:
            probe = await egress.take_probe(
                self._session, self._settings.egress, self._request_at_most()
            )
        if probe is None:
            self._survey_at = min(self._survey_at, clock.now() + self._settings.poll_interval)
            self._breaker.know(await egress.state(self._session, self._settings.egress))
            return False
        for candidate in candidates:
            if await self._claim_probe(
                candidate.service_id, egress_probe=probe, probe_service=candidate.probe_due
            ):
                log.info("egress.probing", egress=self._settings.egress)
                break
        else:
            await egress.return_probe(self._session, self._settings.egress, probe)
        self._breaker.know(await egress.state(self._session, self._settings.egress))
        return False

    async def _probe_candidates(self) -> list[outbox.Waiting]:
        """Services that may bring a message now.

        A probe that is taken in vain keeps back all workers if this one dies with it.
        """
        found = [
            w
            for w in await self._waiting()
            if (w.may_send or w.probe_due) and w.service_id not in self._later
        ]
        if not found:
            return []
        spent = await quota.spent(self._session, [w.service_id for w in found])
        return [w for w in found if w.service_id not in spent]

    async def _claim_probe(
        self, service: int, *, egress_probe: Probe | None = None, probe_service: bool = False
    ) -> bool:
        """Claim the one message of a probe, and begin to send it; False if there is none.

        One that is refused, or whose number has to be read first, makes no request.
        """
        while not self._stopping:
            self.looked_at = clock.now()
            claimed = await self._claim(
                {service: 1}, egress_probe=egress_probe, probe_service=probe_service
            )
            if claimed.begun or not claimed.kept_back:
                return bool(claimed.begun)
        return False

    async def _claim(
        self,
        asked: dict[int, int],
        *,
        egress_probe: Probe | None = None,
        probe_service: bool = False,
    ) -> _Claimed:
        """Claim up to the places asked for and begin to send."""
        began = clock.now()
        try:
            claim = await outbox.claim(
                self._session,
                self._lease.worker_id,
                asked,
                heads=self._heads,
                probe_egress=egress_probe is not None,
                probe_service=probe_service,
            )
        except outbox.ClaimRefused as error:
            await self._isolate(asked, error)
            return _Claimed(0, 0)
        except DatabaseLost:
            self._reclaim_due = True
            raise
        common = {row["service_id"]: row for row in claim.services}
        last_slot = {row["service_id"]: row["id"] for row in claim.sending}
        for row in claim.sending:
            self.sender.begin(
                self._message(
                    row,
                    common[row["service_id"]],
                    began,
                    last_slot=last_slot[row["service_id"]] == row["id"],
                    egress_probe=egress_probe,
                    probe_service=probe_service,
                )
            )
        for row in claim.refused:
            self._tell_refused(row)
        if claim.unread:
            await self._read_numbers(claim.unread)
        got = Counter(
            row["service_id"]
            for rows in (claim.sending, claim.refused, claim.unread)
            for row in rows
        )
        # Their messages can be claimed now that their numbers are read.
        again = {row["service_id"] for row in claim.unread}
        for service, row in common.items():
            if service in again:
                continue
            if got[service] >= asked[service]:
                # While more waits than is asked for. What commits late is for the next survey.
                self._heads[service] = self._heads.get(service, {}) | outbox.heads_in(row)
                self._survey_at = min(self._survey_at, began + OVERTAKEN)
                continue
            self._active.discard(service)
            if row["slots_short"]:
                self._later[service] = self._clock.local(row["slot"]) - outbox.HORIZON / 2
            if row["spent"] is not None:
                self._tell_spent(service, row["spent"], row["send_before"])
        self._active.difference_update(asked.keys() - common.keys())
        if not common:
            # The egress or the lease is closed by the database's word; ours is out of date.
            self._egress_stale = True
        return _Claimed(len(claim.sending), len(claim.refused) + len(claim.unread))

    async def _isolate(self, asked: dict[int, int], error: outbox.ClaimRefused) -> None:
        """Find the service whose rows make the claim fail, and leave it alone for a while."""
        if len(asked) > 1:
            for service, places in asked.items():
                await self._claim({service: places})
            return
        (service,) = asked
        log.error("service.failed", service_id=service, sqlstate=error.sqlstate)
        self._active.discard(service)
        self._quarantine[service] = clock.now() + FAILING

    def _message(
        self,
        row: Record,
        common: Record,
        began: float,
        *,
        last_slot: bool,
        egress_probe: Probe | None,
        probe_service: bool,
    ) -> Message:
        local = self._clock.local
        return Message(
            id=row["id"],
            claim_no=row["claim_no"],
            service_id=row["service_id"],
            user_id=common["user_id"],
            msisdn=row["number"],
            text=row["text"],
            extended=row["extended"],
            attempt=row["attempts"] + 1,
            failures=row["failures"],
            doubted=row["doubts"] > 0,
            claimed_at=began,
            slot=None if row["slot"] is None else local(row["slot"]),
            delay=common["delay"] or 0.0,
            last_slot=last_slot,
            send_before=None if common["send_before"] is None else local(common["send_before"]),
            expires=None if row["expires"] is None else local(row["expires"]),
            ban_episode=common["ban_episode"],
            egress_probe=egress_probe,
            probes_service=probe_service,
        )

    async def release_lost_claims(self) -> None:
        """Give back what the database says we hold and we do not: the claim's answer was lost."""
        rescued, self._reclaim_due, self._reclaim_rescued = self._reclaim_rescued, False, False
        try:
            await self._release_lost_claims(rescued=rescued)
        except DatabaseLost:
            self._reclaim_due = True
            self._reclaim_rescued = self._reclaim_rescued or rescued
            raise

    async def _release_lost_claims(self, *, rescued: bool) -> None:
        rows = await outbox.held(self._session, self._lease.worker_id, rescued=rescued)
        lost = [row for row in rows if (row["id"], row["claim_no"]) not in self.sender.held]
        if lost:
            await outbox.record(
                self._session,
                [
                    outbox.Result(
                        row["id"],
                        row["claim_no"],
                        self._lease.worker_id,
                        row["service_id"],
                        outcomes.RELEASED,
                    )
                    for row in lost
                ],
            )
            log.warning("claim.returned", messages=len(lost))

    async def _read_numbers(self, rows: list[Record]) -> None:
        region = self._settings.region
        numbers = {(row["id"], row["msisdn"]): normalise(row["msisdn"], region) for row in rows}
        for row in await outbox.read_numbers(self._session, numbers):
            self._tell_refused(row)

    def _tell_refused(self, row: Record) -> None:
        status = Status(row["status"])
        self._metrics.outcomes(1, row["service_id"], status.value, NOT_SENT)
        log.info(
            EVENTS[status],
            id=row["id"],
            service_id=row["service_id"],
            msisdn=masked(row["msisdn"]),
            reply=None,
            provider_id=None,
            attempt=row["attempts"],
            latency_ms=None,
            error=row["error"],
        )

    def _tell_spent(self, service: int, period: str, until_epoch: float) -> None:
        """Say once a window that a service's own count has reached the limit."""
        if self._spent.get((service, period)) != until_epoch:
            self._spent[service, period] = until_epoch
            log.warning("quota.exhausted", service_id=service, period=period, told_by="own count")

    async def _reserve(self, service_id: int) -> float:
        return self._clock.local(await services.reserve(self._pace_session, service_id))

    def _freed(self) -> None:
        if self._active and not self._wake.is_set():
            self._wake.set()
