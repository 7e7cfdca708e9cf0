"""The pacer on a loop whose time passes only as the test says: nothing sleeps, nothing flickers."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Iterator
from itertools import cycle, pairwise, repeat
from math import floor
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher import clock
from dispatcher.db.outbox import GUARD, LEAD
from dispatcher.db.pool import DatabaseLost
from dispatcher.pacing import APPROACH, TOLERANCE, Pacer, Slot, until

ROUND = 0.0001
"""Seconds that one round of the loop takes at least."""

DELAY = 0.05
SERVICE = 42


class Leap(selectors.DefaultSelector):
    """Leaps over the time that the loop would sleep, and is late by the times given."""

    def __init__(self, late: Iterator[float]) -> None:
        super().__init__()
        self.now = 1000.0
        self._late = late

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Look at the sockets without waiting, and move the time on."""
        assert timeout is not None, "nothing will ever happen"
        self.now += max(timeout, ROUND) + next(self._late)
        return super().select(0)


def run(test: Coroutine[Any, Any, None], late: Iterator[float] | None = None) -> None:
    """Run a coroutine on a loop that leaps, with the clock of the machine going along."""
    leap = Leap(late or repeat(0.0))
    loop = asyncio.SelectorEventLoop(leap)
    with (
        # The time of uvloop is whole milliseconds, so its timers may fire early.
        patch.object(loop, "time", lambda: floor(leap.now * 1000) / 1000),
        patch.object(clock, "now", lambda: leap.now),
        asyncio.Runner(loop_factory=lambda: loop) as runner,
    ):
        runner.run(test)


class Ledger:
    """Slots of one service, given away one after the other as the database does."""

    def __init__(self, delay: float = DELAY) -> None:
        self.delay = delay
        self.next_slot = 0.0
        self.reserved = 0

    def take(self, count: int) -> list[Slot]:
        """The slots of one claim."""
        first = max(self.next_slot, clock.now() + LEAD)
        step = self.delay + GUARD
        self.next_slot = first + step * count
        return [
            Slot(SERVICE, first + step * nth, self.delay, last=nth == count - 1)
            for nth in range(count)
        ]

    async def reserve(self, service_id: int) -> float:
        """One slot more, for a message that missed its own."""
        assert service_id == SERVICE
        self.reserved += 1
        await asyncio.sleep(0.002)
        return self.take(1)[0].at


async def away(service_id: int) -> float:
    """A database that is away."""
    raise DatabaseLost("connection refused")


async def leave(pacer: Pacer, slot: Slot, left: list[float], slow: float = 0.0) -> None:
    """One message: it wakes shortly before its slot, connects, waits, and leaves."""
    await until(slot.at - APPROACH)
    await asyncio.sleep(slow)
    await pacer.wait(slot)
    if not slot.lost:
        left.append(clock.now())


async def test_until_is_never_early() -> None:
    """On the real clock too, a moment is over when the wait for it ends."""
    for seconds in (0.0, 0.0004, 0.0011, 0.003, 0.0101):
        moment = clock.now() + seconds
        await until(moment)
        assert clock.now() >= moment


def test_slots_are_met() -> None:
    """Messages that are in time leave one after the other, each in its own slot."""

    async def test() -> None:
        ledger, left = Ledger(), list[float]()
        pacer = Pacer(ledger.reserve)
        slots = ledger.take(20)
        moments = [slot.at for slot in slots]

        await asyncio.gather(*(leave(pacer, slot, left) for slot in slots))

        assert ledger.reserved == 0
        assert all(0 <= at - slot <= 2 * ROUND for at, slot in zip(left, moments, strict=True))

    run(test())


def test_missed_slot_is_reserved_anew() -> None:
    """A message that comes too late for its slot leaves in another one, and never between."""

    async def test() -> None:
        ledger, left = Ledger(), list[float]()
        (slot,) = ledger.take(1)
        (other,) = ledger.take(1)
        planned = slot.at

        await leave(Pacer(ledger.reserve), slot, left, slow=APPROACH + 3 * TOLERANCE)

        assert (slot.missed, ledger.reserved) == (1, 1)
        assert left[0] >= other.at + DELAY > planned + DELAY

    run(test())


def test_late_one_makes_its_own_next_wait() -> None:
    """Where the next slot is the same worker's, a late message goes and the next one waits."""

    async def test() -> None:
        ledger, left = Ledger(), list[float]()
        pacer = Pacer(ledger.reserve)
        slots = ledger.take(3)

        await asyncio.gather(
            leave(pacer, slots[0], left, slow=APPROACH + DELAY / 2),
            leave(pacer, slots[1], left),
        )

        assert slots[0].missed == slots[1].missed == ledger.reserved == 0
        assert left[1] - left[0] >= DELAY

    run(test())


def test_lost_database_gives_no_slot() -> None:
    """A message that missed its slot while the database is away has none, and does not wait."""

    async def test() -> None:
        (slot,) = Ledger().take(1)

        await leave(Pacer(away), slot, [], slow=APPROACH + 3 * TOLERANCE)

        assert slot.lost

    run(test())


def test_new_delay_is_taken_over() -> None:
    """When the pace of a service changes, the next message keeps to the new delay."""

    async def test() -> None:
        ledger, left = Ledger(), list[float]()
        pacer = Pacer(ledger.reserve)
        await leave(pacer, ledger.take(1)[0], left)
        ledger.delay = 4 * DELAY

        for slot in ledger.take(2):
            await leave(pacer, slot, left)

        assert left[2] - left[1] >= 4 * DELAY

    run(test())


def test_services_do_not_wait_for_each_other() -> None:
    """The pace of one service does not hold up another."""

    async def test() -> None:
        pacer = Pacer(away)
        left: list[float] = []
        now = clock.now()

        await asyncio.gather(
            *(leave(pacer, Slot(n, now + 0.04, DELAY, last=True), left) for n in range(5))
        )

        assert max(left) - min(left) < TOLERANCE

    run(test())


@pytest.mark.parametrize("last", [True, False])
def test_met(last: bool) -> None:  # noqa: FBT001 - pytest gives a parameter by its name
    """A slot is met a millisecond after it, or a whole delay where the next is ours too."""
    slot = Slot(SERVICE, 100.0, DELAY, last=last)
    width = TOLERANCE if last else DELAY

    assert slot.met(100.0)
    assert slot.met(100.0 + width * 0.99)
    assert not slot.met(100.0 + width * 1.01)


def now_and_then_late(seed: int) -> Iterator[float]:
    """A busy machine: every third round of the loop takes up to 4 ms longer."""
    random = Random(seed)
    while True:
        yield random.uniform(0, 0.004) if random.random() < 1 / 3 else 0.0


@given(
    claims=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 5), st.floats(0, 0.2)), min_size=1, max_size=6
    ),
    slow=st.lists(st.floats(0, 0.15), min_size=1, max_size=7),
    seed=st.integers(0, 2**32),
    delay=st.sampled_from([0.002, 0.05, 0.3]),
)
def test_apart_whatever_is_late(
    claims: list[tuple[int, int, float]], slow: list[float], seed: int, delay: float
) -> None:
    """Three workers never send closer than the delay, however late loops and connections are."""

    async def test() -> None:
        ledger, left = Ledger(delay), list[float]()
        pacers = [Pacer(ledger.reserve) for _ in range(3)]
        delays = cycle(slow)
        async with asyncio.TaskGroup() as group:
            for number, count, pause in claims:
                for slot in ledger.take(count):
                    group.create_task(leave(pacers[number], slot, left, next(delays)))
                await asyncio.sleep(pause)

        assert len(left) == sum(count for _, count, _ in claims)
        assert all(after - before >= delay - 1e-9 for before, after in pairwise(sorted(left)))

    run(test(), now_and_then_late(seed))
