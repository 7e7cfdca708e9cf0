"""What one answer means for the messages after it: blocks, bans, an ill or unreachable provider."""

from __future__ import annotations

import asyncpg

from tests.builders import add_message, add_messages, add_service
from tests.e2e.harness import (
    Connection,
    free_port,
    message,
    midday,
    simulator,
    statuses,
    until_statuses,
    wait_for,
    worker,
)

DISABLED, FOREIGN, MISMATCH, DAY, WEEK, MONTH, HASTY = range(1, 8)
SERVICES = [
    {"id": DISABLED, "disabled": True},
    {"id": FOREIGN, "allowed_ips": ["192.0.2.1"]},
    {"id": MISMATCH, "user": 8},
    {"id": DAY, "day": 2, "timezone": midday()},
    {"id": WEEK, "week": 1, "timezone": midday()},
    {"id": MONTH, "month": 1, "timezone": midday()},
    {"id": HASTY, "delay": 0.03},
]


async def test_answers_that_stop_a_service(database: str, connection: Connection) -> None:
    """A service that is refused waits or is blocked, alone, and goes on when that is mended."""
    for service in range(DISABLED, HASTY + 1):
        await add_service(connection, service, timezone=midday())
    ids = {n: await add_messages(connection, 3, service_id=n) for n in range(DISABLED, MISMATCH)}
    ids[MISMATCH] = await add_messages(connection, 9, service_id=MISMATCH)
    for service in (DAY, WEEK, MONTH):
        await add_messages(connection, 3, service_id=service)
    await add_messages(connection, 12, service_id=HASTY)

    async with (
        simulator(services=SERVICES) as provider,
        # One request at a time, so that five in a row are five.
        worker(database, provider.url, concurrency=1, probe_interval=1) as run,
    ):
        await until_statuses(connection, accepted=2 + 1 + 1 + 12, rejected=5, pending=3 + 3 + 4 + 5)
        blocks = {
            n: (await run.event("service.blocked", service_id=n))["reason"]
            for n in (DISABLED, FOREIGN, MISMATCH)
        }
        # A probe that meets the same again keeps the block, with one message.
        await run.event("service.probing", service_id=DISABLED)
        await run.event("service.blocked", service_id=DISABLED, nth=2)

        async def given_back() -> asyncpg.Record | None:
            row = await message(connection, ids[DISABLED][0])
            return row if row["status"] == "pending" and row["reply"] else None

        refused = await wait_for(given_back, "the refused message to wait again")
        elsewhere = await connection.fetchval(
            "SELECT blocked_reason FROM service WHERE service_id = 2"
        )
        here = await connection.fetchrow("SELECT * FROM egress_service")
        await provider.set(
            services=[
                {"id": DISABLED, "disabled": False},
                {"id": FOREIGN, "allowed_ips": []},
                {"id": MISMATCH, "user": 7},
            ]
        )
        for service in (DISABLED, FOREIGN, MISMATCH):
            await run.event("service.resumed", service_id=service)
        await wait_for(lambda: none_pending(connection, MISMATCH), "the rest of the services")
        received = await provider.received()
        assert await run.stop() == 0

    assert blocks == {
        DISABLED: "SERVICE_DISABLED",
        FOREIGN: "INVALID_IP",
        MISMATCH: "INVALID_INPUT",
    }
    assert refused is not None
    assert (refused["reply"], refused["attempts"]) == ("SERVICE_DISABLED", 0)
    assert refused["error"] is not None
    assert elsewhere is None
    assert here is not None
    assert (here["egress"], here["service_id"]) == ("default", FOREIGN)

    # A wrong setting burns five messages, and one for each probe: never the backlog.
    answers = {int(n): told["answers"] for n, told in received["services"].items()}
    probes = len(run.seen("service.probing", service_id=MISMATCH))
    assert 5 <= answers[MISMATCH]["INVALID_INPUT"] <= 5 + probes
    assert answers[MISMATCH]["MSG_OK"] == 9 - answers[MISMATCH]["INVALID_INPUT"]
    # A limit is believed: one refusal is enough, and the count is what was accepted.
    assert answers[DAY] == {"MSG_OK": 2, "LIMIT_DAY": 1}
    assert answers[WEEK] == {"MSG_OK": 1, "LIMIT_WEEK": 1}
    assert answers[MONTH] == {"MSG_OK": 1, "LIMIT_MONTH": 1}
    for service in (DAY, WEEK, MONTH):
        assert run.seen("quota.exhausted", service_id=service)[0]["told_by"] == "provider"
    assert answers[HASTY]["MSG_OK"] == 12
    assert answers[HASTY]["LIMIT_DELAY"] >= 1
    assert run.seen("service.slowed", service_id=HASTY)
    counts = await connection.fetch(
        "SELECT service_id, used FROM quota_usage WHERE period = 'month' ORDER BY service_id"
    )
    assert {row["service_id"]: row["used"] for row in counts} == {
        n: told.get("MSG_OK", 0) for n, told in answers.items()
    }
    accepted = (
        "SELECT bool_and(attempts = 1 AND error IS NULL) FROM outbox WHERE status = 'accepted'"
    )
    assert await connection.fetchval(accepted)
    assert received["received_twice"] == 0


async def none_pending(connection: Connection, last_service: int) -> bool:
    """Whether nothing waits any more in the services up to this one."""
    return not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM outbox "
        "WHERE service_id <= $1 AND status IN ('pending', 'sending'))",
        last_service,
    )


async def test_ban_in_flight(database: str, connection: Connection) -> None:
    """A ban stops all workers of the egress at once, and one probe at a time ends it."""
    await add_service(connection)
    await add_messages(connection, 120)
    async with (
        simulator(ban={"after": 30, "seconds": 3600}, faults={"latency": [0.02, 0.06]}) as provider,
        worker(database, provider.url, concurrency=5, ban_backoff=0.5, ban_backoff_max=1) as first,
        worker(database, provider.url, concurrency=5, ban_backoff=0.5, ban_backoff_max=1) as second,
    ):
        # The probes meet the ban twice, then it is lifted.
        async def probed_in_vain() -> bool:
            told = first.seen("egress.banned") + second.seen("egress.banned")
            return len(told) >= 3

        await wait_for(probed_in_vain, "two probes that are answered by the ban")
        met = (await provider.received())["answers"]["BAN_IP_TEMP"]
        counts = await statuses(connection)
        episode = await connection.fetchrow("SELECT * FROM egress")
        await provider.set(unban=True)
        await until_statuses(connection, accepted=120)
        received = await provider.received()
        assert await first.stop() == 0
        assert await second.stop() == 0

    probes = [*first.seen("egress.probing"), *second.seen("egress.probing")]
    bans = [*first.seen("egress.banned"), *second.seen("egress.banned")]
    resumed = [*first.seen("egress.resumed"), *second.seen("egress.resumed")]
    assert {ban["episode"] for ban in bans} == {1}
    assert len(resumed) == 1
    assert len(probes) == len(bans) - 1 + len(resumed)
    # What was in flight meets the ban, and then only probes do.
    assert 1 <= met <= 2 * 5 + 2
    assert received["answers"]["BAN_IP_TEMP"] <= met + 1
    assert counts["accepted"] <= 30 + 2 * 5
    assert set(counts) <= {"accepted", "pending", "sending"}
    assert episode is not None
    assert episode["ban_episode"] == 1
    assert episode["banned_until"] is not None
    assert await connection.fetchval("SELECT bool_and(attempts = 1) FROM outbox")
    assert await connection.fetchval("SELECT used FROM quota_usage WHERE period = 'day'") == 120
    assert received["received_twice"] == 0


async def test_ban_outlives_the_worker(database: str, connection: Connection) -> None:
    """A worker that starts while its address is banned sends nothing before the probe is due."""
    await add_service(connection)
    await add_message(connection)
    async with simulator() as provider:
        await provider.set(ban_now=3600)
        async with worker(database, provider.url, ban_backoff=600) as before:
            await before.event("egress.banned")
            assert await before.stop() == 0
        async with (
            worker(database, provider.url, ban_backoff=600) as after,
            worker(database, provider.url, egress="other", ban_backoff=600) as other,
        ):
            await after.started()
            # The other address is not known to be banned, so it tries, and learns for itself.
            await other.event("egress.banned", egress="other")
            received = await provider.received()
            wait = await connection.fetchval(
                "SELECT banned_until - clock_timestamp() FROM egress WHERE name = 'default'"
            )
            assert await after.stop() == 0
            assert await other.stop() == 0

    assert received["requests"] == 2
    assert after.seen("egress.probing") == []
    assert 500 < wait.total_seconds() <= 600 * 1.25


async def test_ill_provider(database: str, connection: Connection) -> None:
    """Answers that are none pause the egress after a few, and a good probe lets it go on."""
    await add_service(connection)
    await add_messages(connection, 200)
    concurrency = 5
    async with (
        simulator(faults={"garbage": 0.4, "error": 0.3, "drop": 0.3, "latency": 0.02}) as provider,
        worker(database, provider.url, concurrency=concurrency) as run,
    ):
        await run.event("egress.ill")
        await wait_for(lambda: nothing_held(connection), "all in flight to be recorded")
        ill = await statuses(connection)
        state = await connection.fetchrow("SELECT * FROM egress")
        await provider.set(faults={"garbage": 0, "error": 0, "drop": 0})
        await run.event("egress.resumed")
        await wait_for(lambda: none_pending(connection, 42), "the rest of the messages")
        received = await provider.received()
        in_doubt = await connection.fetch("SELECT * FROM outbox WHERE status = 'unknown'")
        assert await run.stop() == 0

    assert 5 <= ill["unknown"] <= 2 * concurrency
    assert ill == {"unknown": ill["unknown"], "pending": 200 - ill["unknown"]}
    assert state is not None
    assert (state["ill_until"] is not None, state["banned_until"]) == (True, None)
    assert len(run.seen("egress.probing")) >= 1
    assert len(in_doubt) == ill["unknown"]
    assert {row["attempts"] for row in in_doubt} == {1}
    assert all(row["error"].endswith("see 'dispatcher resolve'.") for row in in_doubt)
    assert received["accepted"] == 200 - len(in_doubt)
    assert received["requests"] == 200
    # In doubt counts in the quota.
    assert await connection.fetchval("SELECT used FROM quota_usage WHERE period = 'day'") == 200


async def nothing_held(connection: Connection) -> bool:
    """Whether no message is with a worker."""
    return not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM outbox WHERE status = 'sending')"
    )


async def test_doubt_is_sent_again_where_asked(database: str, connection: Connection) -> None:
    """A service that takes a second SMS for better than none has its doubts sent again."""
    await add_service(connection, on_unknown="retry")
    doubtful = await add_message(connection)
    async with (
        simulator(faults={"late": 1}) as provider,
        worker(database, provider.url, unknown_retry_after=0.5, request_timeout=5) as run,
    ):
        await run.event("message.unknown", id=doubtful)
        await provider.set(faults={"late": 0})
        await run.event("message.accepted", id=doubtful)
        received = await provider.received()
        assert await run.stop() == 0

    row = await message(connection, doubtful)
    assert (row["status"], row["attempts"]) == ("accepted", 2)
    assert received["requests"] == received["accepted"] == 2
    assert await connection.fetchval("SELECT used FROM quota_usage WHERE period = 'day'") == 2


async def test_unreachable_provider(database: str, connection: Connection) -> None:
    """While nothing listens the worker waits, message by message, and then sends them all."""
    await add_service(connection, day_limit=60, timezone=midday())
    await add_messages(connection, 60)
    port = free_port()
    async with worker(
        database, f"http://127.0.0.1:{port}/users/send_bulk.php", concurrency=5
    ) as run:
        await run.event("provider.unreachable")

        async def waited() -> bool:
            long_ago = (
                "SELECT min(status_at) < now() - interval '1.5 s' FROM outbox WHERE failures > 0"
            )
            return bool(await connection.fetchval(long_ago))

        await wait_for(waited, "time in which the worker could do much")
        tried = await connection.fetchval("SELECT count(*) FROM outbox WHERE failures > 0")
        async with simulator(port=port) as provider:
            await until_statuses(connection, accepted=60)
            received = await provider.received()
            assert await run.stop() == 0

    # It did not walk through the backlog, and what never left was no attempt and cost nothing.
    assert tried <= 2 * 5 + 3
    assert await connection.fetchval("SELECT bool_and(attempts = 1) FROM outbox")
    assert await connection.fetchval("SELECT used FROM quota_usage WHERE period = 'day'") == 60
    assert received["requests"] == 60
    assert run.seen("provider.reachable")
