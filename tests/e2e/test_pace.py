"""Limits over several workers, seen from the provider: exact counts, and the pace on the wire."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import time

from tests.builders import add_messages, add_service
from tests.e2e.harness import (
    Connection,
    Worker,
    midday,
    simulator,
    statuses,
    until_statuses,
    wait_for,
    worker,
)
from tests.integration.peers import zone_where

WEDNESDAY = 2
PACED, UNPACED = 1, 2


async def three_workers(stack: AsyncExitStack, database: str, url: str) -> list[Worker]:
    """Three workers that have started."""
    workers = [await stack.enter_async_context(worker(database, url)) for _ in range(3)]
    for run in workers:
        await run.started()
    return workers


async def test_quota_over_three_workers(database: str, connection: Connection) -> None:
    """Three workers send exactly what the limits allow, and never ask for more."""
    limits = {"day": 70, "week": 100, "month": 85}
    await add_service(
        connection, 1, timezone=midday(), **{f"{name}_limit": n for name, n in limits.items()}
    )
    await add_service(connection, 2, timezone=midday(), month_limit=50)
    services = [
        {"id": 1, "timezone": midday(), **limits},
        {"id": 2, "timezone": midday(), "month": 50},
    ]
    async with (
        simulator(services=services, faults={"latency": [0.01, 0.05]}) as provider,
        AsyncExitStack() as stack,
    ):
        workers = await three_workers(stack, database, provider.url)
        for service in (1, 2):
            await add_messages(connection, 120, service_id=service)
        await until_statuses(connection, accepted=70 + 50, pending=50 + 70)
        # The provider first: a LIMIT_DAY would be believed until tomorrow.
        await provider.set(services=[{"id": 1, "day": None}])
        await connection.execute("UPDATE service SET day_limit = NULL WHERE service_id = 1")
        await until_statuses(connection, accepted=85 + 50, pending=35 + 70)
        for run in workers:
            assert await run.stop() == 0
        received = await provider.received()

    assert received["answers"] == {"MSG_OK": 85 + 50}
    assert received["repeated"] == 0
    assert await statuses(connection) == {"accepted": 135, "pending": 105}
    told = [event for run in workers for event in run.seen("quota.exhausted")]
    assert {(event["service_id"], event["period"]) for event in told} >= {(1, "day"), (2, "month")}
    assert {event["told_by"] for event in told} == {"own count"}


async def test_pace_over_three_workers(database: str, connection: Connection) -> None:
    """Three workers keep a service's delay between them, use it, and hold up nobody else.

    The bounds leave room for a machine that does other things too; bench/ measures the pace.
    """
    delay, messages = 0.05, 80
    await add_service(connection, PACED)
    await add_service(connection, UNPACED)
    await connection.execute("UPDATE service SET min_delay = '50 ms' WHERE service_id = $1", PACED)
    services = [{"id": PACED, "delay": delay}, {"id": UNPACED}]
    async with (
        simulator(services=services, faults={"latency": [0.05, 0.15]}) as provider,
        AsyncExitStack() as stack,
    ):
        workers = await three_workers(stack, database, provider.url)
        await add_messages(connection, messages, service_id=PACED)
        await add_messages(connection, 100, service_id=UNPACED)

        async def unpaced_done() -> bool:
            waits = "SELECT count(*) FROM outbox WHERE service_id = $1 AND status <> 'accepted'"
            return bool(await connection.fetchval(waits, UNPACED) == 0)

        await wait_for(unpaced_done, "the service without a delay")
        beside = await statuses(connection)
        await until_statuses(connection, accepted=messages + 100)
        received = await provider.received()
        for run in workers:
            assert await run.stop() == 0

    paced = received["services"][str(PACED)]
    assert beside["accepted"] < 100 + messages / 2
    assert (messages - 1) / paced["accepted_span"] >= 0.5 / delay, paced
    assert paced["refused_for_delay"] <= 0.5 * messages, paced
    assert received["received_twice"] == 0
    assert await connection.fetchval("SELECT bool_and(attempts = 1) FROM outbox")


async def test_window_that_ends_between_claim_and_sending(
    database: str, connection: Connection
) -> None:
    """A message that waits for its slot past midnight is sent in the day it is counted in."""
    await add_service(connection, day_limit=1000)
    await connection.execute("UPDATE service SET min_delay = '40 ms'")
    async with simulator() as provider, worker(database, provider.url) as run:
        await run.started()
        await connection.execute(
            "UPDATE service SET timezone = $1", zone_where(WEDNESDAY, time(23, 59, 58))
        )
        await add_messages(connection, 100)
        await until_statuses(connection, accepted=100)
        assert await run.stop() == 0

    rows = await connection.fetch(
        """
        SELECT q.used, count(a.*) AS sent
        FROM quota_usage q
        JOIN service s USING (service_id)
        JOIN attempt a ON date_trunc('day', a.sent_at, s.timezone) = q.window_start
        WHERE q.period = 'day' AND a.outcome = 'accepted'
        GROUP BY q.window_start, q.used
        """
    )
    assert len(rows) == 2
    # The moment of sending is known to a millisecond or so, and so is the one at midnight.
    assert all(abs(row["used"] - row["sent"]) <= 1 for row in rows), rows
