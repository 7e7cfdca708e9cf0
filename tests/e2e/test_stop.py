"""How a worker stops: it finishes what is in flight, gives back the rest, and says so."""

from __future__ import annotations

import asyncio
from signal import SIGHUP, SIGINT, SIGTERM, Signals

import pytest

from tests.builders import add_messages, add_service
from tests.e2e.harness import (
    Connection,
    Provider,
    simulator,
    statuses,
    wait_for,
    worker,
)


async def in_flight(provider: Provider, count: int) -> None:
    """Wait until so many requests have come to the provider."""

    async def come() -> bool:
        return int((await provider.received())["requests"]) >= count

    await wait_for(come, f"{count} requests")


async def test_drain(database: str, connection: Connection) -> None:
    """Told to stop, it sends nothing more, waits for its answers, and leaves nothing behind."""
    await add_service(connection)
    await add_messages(connection, 300)
    async with (
        simulator(faults={"latency": [0.2, 0.4]}) as provider,
        worker(database, provider.url) as run,
    ):
        await in_flight(provider, 30)
        code = await run.stop(SIGTERM)
        received = await provider.received()

    counts = await statuses(connection)
    assert code == 0
    assert counts == {"accepted": received["accepted"], "pending": 300 - received["accepted"]}
    assert counts["pending"] > 0
    assert await connection.fetchval("SELECT sum(used) FROM quota_usage") == 3 * counts["accepted"]
    assert await connection.fetchval("SELECT bool_and(lease_until <= now()) FROM worker")
    (stopping,) = run.seen("worker.stopping")
    (stopped,) = run.seen("worker.stopped")
    assert stopping["in_flight"] > 0
    assert run.events[-1] == stopped
    assert run.errors == ""
    assert not (run.folder / "spool").exists()


@pytest.mark.parametrize("number", [SIGINT, SIGHUP])
async def test_drain_gives_back_what_waits_for_its_slot(
    database: str, connection: Connection, number: Signals
) -> None:
    """Messages that wait for their pace do not leave any more, and cost nothing."""
    await add_service(connection)
    await connection.execute("UPDATE service SET min_delay = '100 ms'")
    await add_messages(connection, 20)
    async with simulator() as provider, worker(database, provider.url) as run:
        await in_flight(provider, 1)
        code = await run.stop(number)
        received = await provider.received()

    sent = received["requests"]
    assert code == 0
    # About ten were claimed for the second to come.
    assert sent <= 6
    assert await statuses(connection) == {"accepted": sent, "pending": 20 - sent}
    assert await connection.fetchval("SELECT sum(attempts) FROM outbox") == sent
    assert await connection.fetchval("SELECT sum(used) FROM quota_usage") == 3 * sent


async def test_drain_time_is_over(database: str, connection: Connection) -> None:
    """What is still without an answer at the end of the drain time is in doubt."""
    await add_service(connection)
    await add_messages(connection, 30)
    async with (
        simulator(faults={"hang": 1}) as provider,
        worker(database, provider.url, drain=0.5, concurrency=10) as run,
    ):
        await in_flight(provider, 10)
        code = await run.stop()

    assert code == 0
    assert await statuses(connection) == {"unknown": 10, "pending": 20}
    assert len(run.seen("message.unknown")) == 10
    assert await connection.fetchval("SELECT sum(used) FROM quota_usage") == 3 * 10


async def test_second_signal_ends_at_once(database: str, connection: Connection) -> None:
    """A second signal does not wait for anything; what was in flight is left to the rescuers."""
    await add_service(connection)
    await add_messages(connection, 5)
    async with (
        simulator(faults={"hang": 1}) as provider,
        worker(database, provider.url, drain=60, request_timeout=60) as run,
    ):
        await in_flight(provider, 5)
        run.signal(SIGTERM)
        await run.event("worker.stopping")
        async with asyncio.timeout(20):
            code = await run.stop(SIGINT)

    assert code == 1
    assert await statuses(connection) == {"sending": 5}
    assert run.seen("worker.stopped") == []


async def test_another_goes_on(database: str, connection: Connection) -> None:
    """What a worker gives back as it stops is sent by another, each message once."""
    await add_service(connection)
    await add_messages(connection, 400)
    async with simulator(faults={"latency": [0.05, 0.1]}) as provider:
        async with worker(database, provider.url) as first:
            await in_flight(provider, 50)
            async with worker(database, provider.url) as second:
                await second.started()
                assert await first.stop() == 0

                async def done() -> bool:
                    return await statuses(connection) == {"accepted": 400}

                await wait_for(done, "all to be accepted")
                assert await second.stop() == 0
        received = await provider.received()

    assert received["requests"] == received["accepted"] == 400
    assert received["repeated"] == 0
