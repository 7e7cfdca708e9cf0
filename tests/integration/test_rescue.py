"""What nobody else sees to, on a real PostgreSQL: dead workers, what ran out, what goes again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from dispatcher.db import outbox, workers
from dispatcher.db.pool import Record
from dispatcher.domain.outcomes import doubt
from tests.builders import SERVICE, add_message, add_messages, add_service
from tests.integration.peers import (
    Connection,
    Peer,
    message,
    midweek,
    peer,
    statuses,
    used,
    wait_for,
)

NOW = datetime.now(UTC)
"""Only for what lies hours before or after."""


@pytest.fixture
async def worker(database: str, connection: Connection) -> AsyncIterator[Peer]:
    """A worker that stays alive, and a service."""
    await add_service(connection, timezone=midweek())
    async with peer(database) as entered:
        yield entered


async def die(connection: Connection, worker: Peer) -> None:
    """The lease of a worker has run out, and it was short."""
    await connection.execute(
        "UPDATE worker SET lease = '1 s', lease_until = clock_timestamp() WHERE id = $1",
        worker.worker_id,
    )


async def dead(database: str, connection: Connection, count: int) -> list[Record]:
    """What a worker held that has died."""
    async with peer(database) as gone:
        rows = (await gone.claim(count)).sending
        assert len(rows) == count
        await die(connection, gone)
        return rows


# ------------------------------------------------------------------ rescue


async def test_rows_of_the_dead_are_in_doubt(
    database: str, connection: Connection, worker: Peer
) -> None:
    """What a dead worker held may have been sent: it is in doubt, it counts, and it costs."""
    await add_messages(connection, 3)
    rows = await dead(database, connection, 2)

    rescued = await wait_for(lambda: outbox.rescue(worker.session), "the rescue")

    assert {row["id"] for row in rescued} == {row["id"] for row in rows}
    stored = await message(connection, rows[0]["id"])
    assert (stored["status"], stored["attempts"], stored["retry_at"]) == ("unknown", 1, None)
    assert stored["error"].endswith("see 'dispatcher resolve'.")
    assert stored["status_at"] > stored["claimed_at"]
    assert await used(connection) == (2, 2, 2)
    assert await outbox.rescue(worker.session) == []
    assert await statuses(connection) == {"unknown": 2, "pending": 1}


async def test_rows_of_the_living_stay(connection: Connection, worker: Peer) -> None:
    """A beat, even a late one, which learns so, gives a whole lease more for what is held."""
    await add_messages(connection, 1)
    await worker.claim()
    await die(connection, worker)
    await connection.execute("UPDATE worker SET lease = '1 h'")

    assert await workers.beat(worker.session, worker.worker_id) is False
    assert await workers.beat(worker.session, worker.worker_id) is True

    # That the server runs for less than a lease must not be what keeps the rescuer away.
    await connection.execute("UPDATE worker SET lease = '1 s'")
    assert await outbox.rescue(worker.session) == []
    left = await connection.fetchval("SELECT lease_until - clock_timestamp() FROM worker")
    assert timedelta(minutes=50) < left <= timedelta(hours=1)


async def test_rows_of_nobody(connection: Connection, worker: Peer) -> None:
    """What is held by a worker that was deleted is rescued at once."""
    await add_messages(connection, 1)
    (row,) = (await worker.claim()).sending
    await connection.execute("DELETE FROM worker")

    assert [r["id"] for r in await outbox.rescue(worker.session)] == [row["id"]]


async def test_rescued_once(database: str, connection: Connection, worker: Peer) -> None:
    """However many rescuers go round at once, each row is rescued by one."""
    await add_messages(connection, 50)
    await dead(database, connection, 50)
    found: list[int] = []

    async def go_round(rescuer: Peer) -> None:
        while len(found) < 50:
            found.extend(row["id"] for row in await outbox.rescue(rescuer.session))
            await asyncio.sleep(0)

    async with peer(database) as second, peer(database) as third, asyncio.TaskGroup() as group:
        for rescuer in (worker, second, third):
            group.create_task(go_round(rescuer))

    assert len(found) == len(set(found)) == 50


async def test_answer_after_the_rescue_wins(
    database: str, connection: Connection, worker: Peer
) -> None:
    """A worker that was frozen brings its answer after all, and it is recorded."""
    await add_messages(connection, 1)
    async with peer(database) as frozen:
        rows = (await frozen.claim()).sending
        await die(connection, frozen)
        await wait_for(lambda: outbox.rescue(worker.session), "the rescue")

        assert len(await frozen.record(rows, b"MSG_OK:abc")) == 1

    row = await message(connection, rows[0]["id"])
    assert (row["status"], row["provider_id"], row["attempts"]) == ("accepted", "abc", 1)
    assert row["error"] is None
    assert await used(connection) == (1, 1, 1)


async def test_after_a_restart_the_others_may_beat_first(
    database: str, connection: Connection, worker: Peer
) -> None:
    """Leases that ran out while the server was down bury nobody before a whole lease is over."""
    await add_messages(connection, 1)
    await worker.claim()
    # The server of the tests has not run for a year, as one that was just restarted has not.
    await connection.execute(
        "UPDATE worker SET lease = '1 year', lease_until = now() - interval '1 s'"
    )

    assert await outbox.rescue(worker.session) == []


async def test_worker_that_leaves(database: str, connection: Connection, worker: Peer) -> None:
    """A worker that leaves ends its lease at once, and wakes nobody's inserts any more."""
    async with peer(database) as leaving:
        await workers.set_idle(leaving.session, leaving.worker_id, idle=True)
        await workers.leave(leaving.session, leaving.worker_id)

    row = await connection.fetchrow(
        "SELECT idle, lease_until <= clock_timestamp() AS over FROM worker WHERE id = $1",
        leaving.worker_id,
    )
    assert row is not None
    assert (row["idle"], row["over"]) == (False, True)


async def test_forgetting(connection: Connection, worker: Peer) -> None:
    """Workers that are gone for a day are forgotten, unless something is still theirs."""
    await add_messages(connection, 1)
    await worker.claim()
    await connection.execute(
        """
        INSERT INTO worker (egress, host, pid, version, lease, lease_until)
        SELECT 'default', 'old', n, '0', '30 s', now() - n * interval '10 hours'
        FROM generate_series(1, 3) AS n
        """
    )
    await connection.execute(
        "UPDATE worker SET lease_until = now() - interval '2 days' WHERE id = $1", worker.worker_id
    )

    await workers.forget(worker.session)

    left = await connection.fetch("SELECT pid FROM worker WHERE host = 'old' ORDER BY pid")
    assert [row["pid"] for row in left] == [1, 2]
    assert await connection.fetchval("SELECT count(*) FROM worker") == 3
    assert await workers.beat(worker.session, 999) is None


# ------------------------------------------------------------------ what ran out


async def test_expiry(connection: Connection, worker: Peer) -> None:
    """What ran out while it waited is ended, also in a service that is paused or blocked."""
    await connection.execute(
        "UPDATE service SET paused = true, blocked_until = now(), blocked_reason = 'X'"
    )
    late = await add_message(connection, expires_at=NOW - timedelta(hours=1))
    await add_message(connection, expires_at=NOW + timedelta(hours=1))
    await add_message(connection)
    await add_message(connection, expires_at=NOW - timedelta(hours=1), status="unknown")

    rows = await outbox.expire(worker.session)

    assert [(row["id"], row["status"]) for row in rows] == [(late, "expired")]
    stored = await message(connection, late)
    assert stored["error"] == "Its expires_at passed before it could be sent."
    assert stored["status_at"] > stored["created_at"]
    assert await statuses(connection) == {"expired": 1, "pending": 2, "unknown": 1}


# ------------------------------------------------------------------ what goes again


async def in_doubt(connection: Connection, worker: Peer) -> int:
    """A message in doubt."""
    message_id = await add_message(connection)
    await worker.record((await worker.claim()).sending, doubt("No answer came (reset)."))
    return message_id


async def test_doubt_is_held(connection: Connection, worker: Peer) -> None:
    """Unless its service says otherwise, a message in doubt waits for a person."""
    held = await in_doubt(connection, worker)

    assert await outbox.retry_unknown(worker.session, 0) == []
    assert (await message(connection, held))["status"] == "unknown"


async def test_doubt_goes_again_three_times(connection: Connection, worker: Peer) -> None:
    """Where the service says so it goes again, three times, each a request that costs quota."""
    await connection.execute("UPDATE service SET on_unknown = 'retry'")
    doubtful = await in_doubt(connection, worker)
    for tries in (1, 2, 3):
        again = await outbox.retry_unknown(worker.session, 0)
        assert [row["id"] for row in again] == [doubtful]
        assert (await message(connection, doubtful))["status"] == "pending"
        rows = (await worker.claim()).sending
        await worker.record(rows, doubt("No answer came (reset)."))
        assert await used(connection) == (tries + 1,) * 3

    assert await outbox.retry_unknown(worker.session, 0) == []
    row = await message(connection, doubtful)
    assert (row["status"], row["attempts"]) == ("unknown", 4)


async def test_doubt_waits_its_time(connection: Connection, worker: Peer) -> None:
    """A message in doubt goes again so long after it came into doubt, and not before."""
    await connection.execute("UPDATE service SET on_unknown = 'retry'")
    await in_doubt(connection, worker)

    assert await outbox.retry_unknown(worker.session, 60) == []
    await connection.execute("UPDATE outbox SET status_at = now() - interval '61 s'")
    assert len(await outbox.retry_unknown(worker.session, 60)) == 1


async def test_only_the_service_that_says_so(connection: Connection, worker: Peer) -> None:
    """What one service says of its messages in doubt says nothing of another's."""
    await add_service(connection, SERVICE + 1, on_unknown="retry")
    await in_doubt(connection, worker)

    assert await outbox.retry_unknown(worker.session, 0) == []


async def test_doubt_that_expires(connection: Connection, worker: Peer) -> None:
    """What was in doubt and ran out before it went again is in doubt again, and stays so."""
    await connection.execute("UPDATE service SET on_unknown = 'retry'")
    late = await in_doubt(connection, worker)
    claimed = await in_doubt(connection, worker)
    runs_out = "UPDATE outbox SET expires_at = now() - interval '1 s' WHERE id = $1"
    assert len(await outbox.retry_unknown(worker.session, 0)) == 2
    await connection.execute(runs_out, late)
    expired = await outbox.expire(worker.session)
    await connection.execute(runs_out, claimed)
    refused = (await worker.claim()).refused

    assert [(row["id"], row["status"]) for row in expired] == [(late, "unknown")]
    assert [(row["id"], row["status"]) for row in refused] == [(claimed, "unknown")]
    assert await outbox.retry_unknown(worker.session, 0) == []
    row = await message(connection, late)
    assert row["error"].startswith("It may have been sent;")
    assert row["error"] == (await message(connection, claimed))["error"]
    assert await used(connection) == (2, 2, 2)


async def test_late_doubt_changes_nothing(connection: Connection, worker: Peer) -> None:
    """A doubt that comes after the message was given back undoes neither that nor a cancel."""
    await connection.execute("UPDATE service SET on_unknown = 'retry'")
    waits, cancelled = [await add_message(connection) for _ in range(2)]
    rows = (await worker.claim()).sending
    await connection.execute("UPDATE outbox SET status = 'unknown', attempts = 1, error = 'gone'")
    assert len(await outbox.retry_unknown(worker.session, 0)) == 2
    await connection.execute("UPDATE outbox SET status = 'cancelled' WHERE id = $1", cancelled)

    await worker.record(rows, doubt("No answer came (reset)."))

    for message_id, status in ((waits, "pending"), (cancelled, "cancelled")):
        stored = await message(connection, message_id)
        assert (stored["status"], stored["error"]) == (status, "gone")
        assert stored["worker_id"] is None
