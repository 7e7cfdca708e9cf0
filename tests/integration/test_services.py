"""What blocks a service and how fast it goes, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise

import asyncpg
import pytest

from dispatcher.db import services
from dispatcher.db.outbox import GUARD, LEAD
from dispatcher.db.pool import Record
from dispatcher.db.services import EXTRA_MOST, GROWTH, STEP_LEAST, STEP_SHARE, STEPS
from tests.builders import SERVICE, add_messages, add_service
from tests.integration.peers import Connection, Peer, peer

HERE = "default"


@pytest.fixture
async def worker(database: str, connection: Connection) -> AsyncIterator[Peer]:
    """A worker that has entered itself, and a service."""
    await add_service(connection)
    async with peer(database) as entered:
        yield entered


async def blocks(connection: Connection) -> asyncpg.Record:
    """Reasons and seconds left of the block for all and of the block for one egress."""
    row = await connection.fetchrow(
        """
        SELECT s.blocked_reason AS reason, e.blocked_reason AS reason_here,
            extract(epoch FROM s.blocked_until - clock_timestamp())::float8 AS seconds,
            extract(epoch FROM e.blocked_until - clock_timestamp())::float8 AS seconds_here
        FROM service s LEFT JOIN egress_service e USING (service_id)
        """
    )
    assert row is not None
    return row


async def make_due(connection: Connection) -> None:
    """The time for a probe has come."""
    for table in ("service", "egress_service"):
        await connection.execute(
            f"UPDATE {table} SET blocked_until = now() WHERE blocked_until IS NOT NULL"  # noqa: S608 - names from above
        )


async def test_block_for_all(connection: Connection, worker: Peer) -> None:
    """A service is blocked with its reason until its first probe."""
    block = await services.block(worker.session, SERVICE, "SERVICE_DISABLED", 600, probe=False)

    assert block is not None
    row = await blocks(connection)
    assert (row["reason"], row["reason_here"]) == ("SERVICE_DISABLED", None)
    assert 599 < row["seconds"] <= 600


async def test_block_for_one_egress(connection: Connection, worker: Peer) -> None:
    """A block for one egress leaves the service itself open."""
    block = await services.block(
        worker.session, SERVICE, "INVALID_IP", 600, probe=False, egress=HERE
    )

    assert block is not None
    row = await blocks(connection)
    assert (row["reason"], row["reason_here"]) == (None, "INVALID_IP")
    assert 599 < row["seconds_here"] <= 600


@pytest.mark.parametrize("egress", [None, HERE])
async def test_standing_block_keeps_its_probe(
    connection: Connection, worker: Peer, egress: str | None
) -> None:
    """Further refusals of messages in flight change nothing; that of a probe begins a new wait."""
    await services.block(worker.session, SERVICE, "FIRST", 10, probe=False, egress=egress)

    second = await services.block(
        worker.session, SERVICE, "SECOND", 600, probe=False, egress=egress
    )
    assert second is None
    row = await blocks(connection)
    assert "FIRST" in (row["reason"], row["reason_here"])
    probed = await services.block(worker.session, SERVICE, "THIRD", 600, probe=True, egress=egress)
    assert probed is not None
    row = await blocks(connection)
    assert "THIRD" in (row["reason"], row["reason_here"])
    assert 599 < (row["seconds"] or row["seconds_here"]) <= 600


@pytest.mark.parametrize("egress", [None, HERE])
async def test_one_probe_for_all(database: str, connection: Connection, egress: str | None) -> None:
    """Of many workers one takes the probe of a blocked service, and only once it is due."""
    await add_service(connection)
    async with peer(database) as first, peer(database) as second:
        await services.block(first.session, SERVICE, "X", 600, probe=False, egress=egress)
        assert not await services.take_probe(first.session, SERVICE, HERE, 600)
        await make_due(connection)

        taken = await asyncio.gather(
            *(
                services.take_probe(p.session, SERVICE, HERE, 600)
                for p in (first, second)
                for _ in range(10)
            )
        )

    assert taken.count(True) == 1
    row = await blocks(connection)
    assert 599 < (row["seconds"] or row["seconds_here"]) <= 600


async def test_probe_of_another_egress(database: str, connection: Connection) -> None:
    """A block for one egress is not probed by the workers of another."""
    await add_service(connection)
    async with peer(database) as here, peer(database, egress="other") as other:
        await services.block(here.session, SERVICE, "X", 600, probe=False, egress=HERE)
        await make_due(connection)

        assert not await services.take_probe(other.session, SERVICE, "other", 600)
        assert await services.take_probe(here.session, SERVICE, HERE, 600)


async def test_unblock(connection: Connection, worker: Peer) -> None:
    """A probe that was answered lifts both blocks, and tells whether there was one."""
    await services.block(worker.session, SERVICE, "X", 600, probe=False)
    await services.block(worker.session, SERVICE, "Y", 600, probe=False, egress=HERE)

    assert await services.unblock(worker.session, SERVICE, HERE)
    assert not await services.unblock(worker.session, SERVICE, HERE)
    assert set((await blocks(connection)).values()) == {None}


async def test_block_for_another_egress_stays(database: str, connection: Connection) -> None:
    """A service that answers one egress may still be closed to another."""
    await add_service(connection)
    async with peer(database) as here, peer(database, egress="other") as other:
        await services.block(other.session, SERVICE, "X", 600, probe=False, egress="other")

        assert not await services.unblock(here.session, SERVICE, HERE)

    assert (await blocks(connection))["reason_here"] == "X"


async def test_unanswered_probe_is_armed_again(connection: Connection, worker: Peer) -> None:
    """A probe without an answer is repeated after the interval, and an open service stays open."""
    await services.arm_probe(worker.session, SERVICE, HERE, 30)
    assert set((await blocks(connection)).values()) == {None}
    await services.block(worker.session, SERVICE, "X", 600, probe=False)
    await services.block(worker.session, SERVICE, "Y", 600, probe=False, egress=HERE)

    await services.arm_probe(worker.session, SERVICE, HERE, 30)

    row = await blocks(connection)
    assert 29 < row["seconds"] <= 30
    assert 29 < row["seconds_here"] <= 30


# ------------------------------------------------------------------ pace


async def slowed(worker: Peer, claims: list[Record]) -> list[float]:
    """The extra delay after each refusal for delay that changed it, in seconds."""
    found = [await services.slow(worker.session, row["id"], row["claim_no"]) for row in claims]
    return [row["extra_delay"] for row in found if row is not None]


@pytest.mark.parametrize(
    ("min_delay", "step"),
    [(0.0, STEP_LEAST), (0.01, STEP_LEAST), (0.05, 0.0005), (1.0, STEP_SHARE), (60.0, 0.6)],
)
async def test_first_refusal_adds_a_hundredth(
    connection: Connection, worker: Peer, min_delay: float, step: float
) -> None:
    """A refusal for delay adds 1 % of the minimum delay, and at least half a millisecond."""
    await connection.execute("UPDATE service SET min_delay = make_interval(secs => $1)", min_delay)
    await add_messages(connection, 1)

    assert await slowed(worker, (await worker.claim()).sending) == [pytest.approx(step)]


async def test_refusals_of_one_claim_count_once(connection: Connection, worker: Peer) -> None:
    """What was claimed before the pace was slowed says nothing about the new pace."""
    await add_messages(connection, 5)
    claims = (await worker.claim()).sending

    assert len(await slowed(worker, claims)) == 1


async def test_further_refusals_add_up_and_then_multiply(
    connection: Connection, worker: Peer
) -> None:
    """Refusals add steps at first; a delay that is set too low is found quickly, up to a most."""
    await add_messages(connection, 40)
    delays: list[float] = []
    for _ in range(40):
        await connection.execute("UPDATE pace SET next_slot = '-infinity'")
        delays += await slowed(worker, (await worker.claim(1)).sending)

    assert delays[:STEPS] == [pytest.approx(STEP_LEAST * n) for n in range(1, STEPS + 1)]
    assert delays[STEPS] == pytest.approx(delays[STEPS - 1] * GROWTH, rel=0.001)
    assert all(a <= b for a, b in pairwise(delays))
    assert delays[-1] == EXTRA_MOST


async def test_answer_to_an_older_claim_slows_nothing(connection: Connection, worker: Peer) -> None:
    """A refusal that belongs to an older claim of its message changes no pace."""
    await add_messages(connection, 1)
    (row,) = (await worker.claim()).sending

    assert await services.slow(worker.session, row["id"], row["claim_no"] + 1) is None


async def test_reserved_slots_follow_each_other(connection: Connection, worker: Peer) -> None:
    """Each slot that is reserved lies a whole delay behind the one before, and in the future."""
    await connection.execute("UPDATE service SET min_delay = '50 ms'")
    await add_messages(connection, 2)
    rows = (await worker.claim()).sending
    await connection.execute("UPDATE pace SET extra_delay = '5 ms'")
    now = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")

    slots = [await services.reserve(worker.session, SERVICE) for _ in range(3)]

    assert slots[0] == pytest.approx(rows[1]["slot"] + 0.05 + GUARD, abs=1e-5)
    assert all(b - a == pytest.approx(0.055 + GUARD, abs=1e-5) for a, b in pairwise(slots))
    assert slots[0] >= now + LEAD


async def test_slot_is_never_in_the_past(connection: Connection, worker: Peer) -> None:
    """After a rest the next slot is a moment ahead, not where the last one ended."""
    await connection.execute("UPDATE service SET min_delay = '1 ms'")
    await add_messages(connection, 1)
    await worker.claim()
    await connection.execute("UPDATE pace SET next_slot = now() - interval '1 h'")
    now = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")

    slot = await services.reserve(worker.session, SERVICE)

    assert slot >= now + LEAD
    assert timedelta(seconds=slot - now) < timedelta(minutes=1)
