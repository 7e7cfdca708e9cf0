"""The circuit breaker: what one answer means for the messages after it.

It shuts at once in this process and then, durably, for all workers of the egress or the service.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import random
from typing import Final

import structlog

from dispatcher import clock
from dispatcher.db import egress, quota, services
from dispatcher.db.pool import Record, Session
from dispatcher.domain.message import Message, Probe
from dispatcher.domain.outcomes import Outcome, Signal
from dispatcher.domain.retry import JITTER, unreachable_delay
from dispatcher.settings import Settings

IN_A_ROW: Final = 5
"""Outcomes in doubt that make a provider ill, requests that never left that make it unreachable,
and answers INVALID_INPUT that block a service; each without a better one between."""

_PERIODS: Final = {
    Signal.DAY_SPENT: "day",
    Signal.WEEK_SPENT: "week",
    Signal.MONTH_SPENT: "month",
}
_BLOCKS: Final = {
    Signal.NOT_ALLOWED: "INVALID_IP",
    Signal.DISABLED: "SERVICE_DISABLED",
    Signal.MALFORMED: "INVALID_INPUT",
}

log = structlog.stdlib.get_logger()


# Not frozen: one is made for each message, and freezing takes half of that time.
@dataclass(slots=True)
class Settled:
    """A claimed message with its outcome, on its way to be recorded."""

    message: Message
    outcome: Outcome
    answered: bool
    """Whether a whole answer of the provider's table came."""
    withheld: bool = False
    """Given back by ourselves before its request left."""
    failed: bool = False
    """Whether its request never left for a fault, of the way there or of our own code."""
    unreached: bool = False
    """Whether the fault was of the way there."""
    retry_in: float | None = None
    left_at: float | None = None
    """When its first byte left, by our clock; None if none did."""
    seconds: float = 0.0
    """From then to the whole answer, or to giving up."""


class Breaker:
    """Knows whether messages may leave through this worker's egress."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = egress.State(banned=False, ill=False, ban_episode=0, probe_in=None)
        self._probe_at: float | None = None
        self._bans: set[tuple[int, int]] = set()
        self._ill = False
        self._doubts = 0
        self._resumed_at = 0.0
        self._unreached = 0
        self._pauses = 0
        self._malformed: Counter[int] = Counter()
        self.unreachable_until: float | None = None
        """Until when this worker waits, because the provider cannot be reached at all."""

    @property
    def open(self) -> bool:
        """Whether messages that are no probe may leave."""
        return self._state.open and not self._bans and not self._ill

    @property
    def probe_at(self) -> float | None:
        """When the egress may be probed, by our clock; None while that is not known."""
        return None if self._bans or self._ill else self._probe_at

    def know(self, state: egress.State) -> None:
        """Take over what the database says of the egress."""
        if state.open and not self._state.open:
            self._resumed_at = clock.now()
            self._doubts = 0
        self._state = state
        self._probe_at = None if state.probe_in is None else clock.now() + state.probe_in

    def shut(self) -> None:
        """Let nothing more leave until the database's word is known."""
        self._state = egress.State(
            banned=True, ill=False, ban_episode=self._state.ban_episode, probe_in=None
        )
        self._probe_at = None

    def learn(self, settled: Settled) -> None:
        """Draw the conclusions that cannot wait for the database."""
        message, outcome = settled.message, settled.outcome
        if outcome.signal is Signal.BANNED and message.ban_episode >= self._state.ban_episode:
            self._bans.add((message.id, message.claim_no))
        if settled.answered:
            self._doubts = 0
            self._reached()
            if outcome.signal is Signal.MALFORMED:
                self._malformed[message.service_id] += 1
            else:
                self._malformed.pop(message.service_id, None)
        elif outcome.in_doubt:
            self._reached()
            if settled.left_at is not None and settled.left_at >= self._resumed_at:
                self._doubts += 1
                if self._doubts >= IN_A_ROW:
                    self._ill = True
        elif settled.unreached:
            self._unreached += 1
            if self._unreached == IN_A_ROW:
                log.warning("provider.unreachable", reason=outcome.error)
            now = clock.now()
            if self._unreached >= IN_A_ROW and (self.unreachable_until or 0.0) <= now:
                self._pauses += 1
                self.unreachable_until = now + unreachable_delay(self._pauses, random())

    def _reached(self) -> None:
        if self._unreached >= IN_A_ROW:
            log.info("provider.reachable")
        self._unreached = self._pauses = 0
        self.unreachable_until = None

    async def apply(self, session: Session, batch: Sequence[Settled]) -> None:
        """Make the conclusions from a batch durable, for all workers. Raises DatabaseLost.

        May be called again for the same batch.
        """
        name = self._settings.egress
        banned = [s for s in batch if (s.message.id, s.message.claim_no) in self._bans]
        probes = [(s, s.message.egress_probe) for s in batch if s.message.egress_probe]
        fresh = [s.message for s in banned if not s.message.egress_probe]
        if fresh:
            await self._ban(session, max(fresh, key=lambda message: message.ban_episode))
        ill = self._ill
        if ill:
            begun = await egress.sicken(session, name)
            if begun is not None:
                log.warning("egress.ill", egress=name, until=begun["ill_until"])
        for settled, probe in probes:
            await self._probed_egress(session, settled, probe)
        if banned or ill or probes:
            self.know(await egress.state(session, name))
            self._bans.difference_update((s.message.id, s.message.claim_no) for s in banned)
            if ill:
                self._ill = False
                self._doubts = 0
        for settled in _telling(batch):
            await self._service(session, settled)

    async def _ban(self, session: Session, message: Message) -> None:
        name = self._settings.egress
        begun = await egress.ban(
            session, name, message.ban_episode, self._settings.ban_backoff, _jitter()
        )
        self._tell_banned(begun)

    def _tell_banned(self, row: Record | None) -> None:
        if row is not None:
            log.warning(
                "egress.banned",
                egress=self._settings.egress,
                episode=row["ban_episode"],
                until=row["banned_until"],
            )

    async def _probed_egress(self, session: Session, settled: Settled, probe: Probe) -> None:
        name = self._settings.egress
        if settled.withheld:
            await egress.return_probe(session, name, probe)
        elif not settled.answered:
            await egress.probe_unanswered(
                session, name, probe, doubt=settled.outcome.in_doubt, jitter=_jitter()
            )
        elif settled.outcome.signal is Signal.BANNED:
            row = await egress.probe_banned(
                session,
                name,
                probe,
                self._settings.ban_backoff,
                self._settings.ban_backoff_max,
                _jitter(),
            )
            self._tell_banned(row)
        elif await egress.resume(session, name, probe):
            log.info("egress.resumed", egress=name)

    async def _service(self, session: Session, settled: Settled) -> None:
        message, signal = settled.message, settled.outcome.signal
        match signal:
            case Signal.NOT_ALLOWED | Signal.DISABLED:
                await self._block(session, message, signal)
            case Signal.MALFORMED if (
                message.probes_service or self._malformed[message.service_id] >= IN_A_ROW
            ):
                await self._block(session, message, signal)
            case Signal.DAY_SPENT | Signal.WEEK_SPENT | Signal.MONTH_SPENT:
                window = await quota.close_window(
                    session, message.id, message.claim_no, _PERIODS[signal]
                )
                if window is not None:
                    log.warning(
                        "quota.exhausted",
                        service_id=message.service_id,
                        period=window["period"],
                        used=window["used"],
                        until=window["closed_until"],
                        told_by="provider",
                    )
            case Signal.TOO_SOON:
                slowed = await services.slow(session, message.id, message.claim_no)
                if slowed is not None:
                    log.info(
                        "service.slowed",
                        service_id=message.service_id,
                        extra_delay_ms=round(slowed["extra_delay"] * 1000, 3),
                    )
        if not message.probes_service or signal in _BLOCKS:
            return
        name, interval = self._settings.egress, self._settings.probe_interval
        if not settled.answered or signal is Signal.BANNED:
            await services.arm_probe(session, message.service_id, name, interval)
        elif await services.unblock(session, message.service_id, name):
            log.info("service.resumed", service_id=message.service_id)

    async def _block(self, session: Session, message: Message, signal: Signal) -> None:
        block = await services.block(
            session,
            message.service_id,
            _BLOCKS[signal],
            self._settings.probe_interval,
            probe=message.probes_service,
            egress=self._settings.egress if signal is Signal.NOT_ALLOWED else None,
        )
        if block is not None:
            log.warning(
                "service.blocked",
                service_id=message.service_id,
                reason=_BLOCKS[signal],
                until=block["blocked_until"],
                egress=self._settings.egress if signal is Signal.NOT_ALLOWED else None,
            )


def _telling(batch: Sequence[Settled]) -> list[Settled]:
    """Those of a batch that tell something of their service.

    All probes, and of others that tell the same the one that was claimed last.
    """
    probes = [settled for settled in batch if settled.message.probes_service]
    last: dict[tuple[int, Signal], Settled] = {}
    for settled in batch:
        message, signal = settled.message, settled.outcome.signal
        if signal is None or message.probes_service:
            continue
        known = last.get((message.service_id, signal))
        if known is None or known.message.claimed_at <= message.claimed_at:
            last[message.service_id, signal] = settled
    return [*probes, *last.values()]


def _jitter() -> float:
    return 1 + JITTER * random()
