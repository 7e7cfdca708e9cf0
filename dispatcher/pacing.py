"""The pace of a service: a slot for each message, reserved in the database, kept to the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from aiolimiter import AsyncLimiter

from dispatcher import clock
from dispatcher.db.pool import DatabaseLost

TOLERANCE: Final = 0.00075
"""Seconds by which a slot may be missed. More is added to each delay, so that a message that is
late and the next one, in time at another worker whose clock is read a little differently, are
still apart."""

APPROACH: Final = 0.03
"""Seconds before its slot at which a message takes a place and a connection."""

SPIN: Final = 0.0015
"""Seconds before its slot from which a message looks at the clock each round of the loop: timers
of the loop are a millisecond wide and may fire early."""


class Slot:
    """When one message may go."""

    __slots__ = ("at", "delay", "last", "lost", "missed", "service_id")

    def __init__(self, service_id: int, at: float, delay: float, *, last: bool) -> None:
        self.service_id = service_id
        self.at = at
        """By our clock (`clock.now`)."""
        self.delay = delay
        """Seconds that must lie between two messages."""
        self.last = last
        """Whether the slot after it may be another worker's, so that it must be met exactly."""
        self.missed = 0
        self.lost = False
        """Missed, and the database away that could give another."""

    def met(self, now: float) -> bool:
        """Whether a message that leaves now keeps away from the one in the next slot.

        Where the next slot is ours too, the message in it waits for this one.
        """
        return now - self.at <= (TOLERANCE if self.last else self.delay)


class Pacer:
    """Keeps messages of services with a minimum delay apart, within and across workers."""

    def __init__(self, reserve: Callable[[int], Awaitable[float]]) -> None:
        """`reserve` gives a service's next free slot by our clock, or raises DatabaseLost."""
        self._reserve = reserve
        self._limiters: dict[int, AsyncLimiter] = {}
        self._left: dict[int, float] = {}

    async def wait(self, slot: Slot) -> None:
        """Wait for a slot, connection in hand; a slot that was missed is reserved anew."""
        limiter = self._limiter(slot)
        while not slot.lost:
            await until(slot.at)
            if slot.met(clock.now()):
                await limiter.acquire()
                # The limiter goes by the loop's time, which is a millisecond wide.
                while (free := self._left.get(slot.service_id, 0.0) + slot.delay) > clock.now():
                    await until(free)
                now = clock.now()
                if slot.met(now):
                    self._left[slot.service_id] = now
                    return
            slot.missed += 1
            slot.last = True
            try:
                slot.at = await self._reserve(slot.service_id)
            except DatabaseLost:
                slot.lost = True

    def _limiter(self, slot: Slot) -> AsyncLimiter:
        limiter = self._limiters.get(slot.service_id)
        if limiter is None or limiter.time_period != slot.delay:
            # One a period: a limiter of n a second lets almost 2n through in the first second.
            limiter = self._limiters[slot.service_id] = AsyncLimiter(1, slot.delay)
        return limiter


async def until(moment: float) -> None:
    """Sleep until a moment of our clock, never less, and seldom more than a fraction of a ms."""
    while (left := moment - clock.now()) > 0:  # noqa: ASYNC110 - time is no event
        await asyncio.sleep(left - SPIN if left > SPIN else 0)
