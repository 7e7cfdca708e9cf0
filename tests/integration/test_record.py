"""Recording on a real PostgreSQL: what becomes of a claimed row, once, and what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from dispatcher.db import outbox, services
from dispatcher.db.pool import Record
from dispatcher.domain.message import Status
from dispatcher.domain.outcomes import (
    ANSWERS,
    EXPIRED,
    RELEASED,
    Outcome,
    classify,
    doubt,
    never_left,
    refused,
)
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

DOUBT = doubt("No answer came (reset).")


@pytest.fixture
async def worker(database: str, connection: Connection) -> AsyncIterator[Peer]:
    """A worker that has entered itself, and a service in none of whose windows the end is near."""
    await add_service(connection, timezone=midweek())
    async with peer(database) as entered:
        yield entered


async def claimed(connection: Connection, worker: Peer, **columns: object) -> Record:
    """A message that was inserted and claimed just now."""
    await add_message(connection, **columns)
    (row,) = (await worker.claim(1)).sending
    return row


async def attempts(connection: Connection) -> list[Record]:
    """The requests that were kept, in order."""
    return await connection.fetch("SELECT * FROM attempt ORDER BY message_id, claim_no")


async def test_numbers_that_begin_anew(connection: Connection, worker: Peer) -> None:
    """After TRUNCATE … RESTART IDENTITY new messages are recorded beside what is kept."""
    await worker.record([await claimed(connection, worker)])
    await connection.execute("TRUNCATE outbox RESTART IDENTITY")
    row = await claimed(connection, worker)

    assert list(await worker.record([row])) == [(row["id"], row["claim_no"])]
    assert [kept["message_id"] for kept in await attempts(connection)] == [row["id"]] * 2


@pytest.mark.parametrize("answer", [*ANSWERS, "MSG_OK:abc", "HTTP 500", "<html>"])
async def test_every_answer(connection: Connection, worker: Peer, answer: str) -> None:
    """Each answer gives the row its status and fields, and gives back what costs nothing."""
    claim = await claimed(connection, worker)
    outcome = classify(200, answer.encode())

    written = await worker.record([claim], outcome)

    row = await message(connection, claim["id"])
    assert row["status"] == outcome.status
    assert row["reply"] == answer
    assert row["provider_id"] == outcome.provider_id
    assert row["error"] == outcome.error
    assert row["attempts"] == int(outcome.counts_attempt)
    assert (row["worker_id"], row["failures"], row["retry_at"]) == (None, 0, None)
    assert row["status_at"] > row["claimed_at"]
    assert (row["accepted_at"] is not None) == (outcome.status is Status.ACCEPTED)
    assert await used(connection) == (int(outcome.costs_quota),) * 3
    assert list(written) == [(claim["id"], claim["claim_no"])]
    (since,) = written.values()
    assert (since is not None) == (outcome.status is Status.ACCEPTED)


@pytest.mark.parametrize(
    ("outcome", "status", "error"),
    [
        (RELEASED, "pending", None),
        (EXPIRED, "expired", "Its expires_at passed before it could be sent."),
        (refused("It failed."), "rejected", "It failed."),
        (
            never_left("connection refused"),
            "pending",
            "The request did not leave (connection refused); it is tried again.",
        ),
    ],
)
async def test_what_did_not_leave(
    connection: Connection,
    worker: Peer,
    outcome: Outcome,
    status: str,
    error: str | None,
) -> None:
    """What certainly never left is no attempt, costs no quota, and is kept as none."""
    claim = await claimed(connection, worker)

    await worker.record([claim], outcome)

    row = await message(connection, claim["id"])
    assert (row["status"], row["error"], row["attempts"]) == (status, error, 0)
    assert await used(connection) == (0, 0, 0)
    assert await attempts(connection) == []


async def test_attempt_is_kept(connection: Connection, worker: Peer) -> None:
    """Each request that left is kept with its time, its length and its answer."""
    claim = await claimed(connection, worker)
    await worker.record([claim], b"LIMIT_DELAY")
    (again,) = (await worker.claim(1)).sending
    await worker.record([again], b"MSG_OK:abc")

    first, second = await attempts(connection)

    assert (first["outcome"], first["reply"]) == ("pending", "LIMIT_DELAY")
    assert (second["outcome"], second["reply"]) == ("accepted", "MSG_OK:abc")
    assert (first["claim_no"], second["claim_no"]) == (1, 2)
    assert first["worker_id"] == worker.worker_id
    assert first["seconds"] == pytest.approx(0.05)
    assert first["sent_at"] < second["sent_at"]


async def test_once_however_often(connection: Connection, worker: Peer) -> None:
    """A batch whose commit was acknowledged too late changes nothing when it is written again."""
    await add_messages(connection, 3)
    rows = (await worker.claim()).sending
    results = [
        worker.result(rows[0], b"MSG_OK:1"),
        worker.result(rows[1], b"INVALID_MSISDN"),
        worker.result(rows[2], DOUBT),
    ]

    first = await outbox.record(worker.session, results)
    before = await connection.fetch("SELECT * FROM outbox ORDER BY id")
    again = await outbox.record(worker.session, results)

    assert len(first) == 3
    assert again == {}
    assert await connection.fetch("SELECT * FROM outbox ORDER BY id") == before
    assert await used(connection) == (2, 2, 2)
    assert len(await attempts(connection)) == 3


async def test_result_of_an_older_claim(connection: Connection, worker: Peer) -> None:
    """A result whose row was given back and claimed again is not the row's any more."""
    old = await claimed(connection, worker)
    await worker.record([old], RELEASED)
    (new,) = (await worker.claim(1)).sending

    assert await worker.record([old], b"MSG_OK:old") == {}
    row = await message(connection, old["id"])
    assert (row["status"], row["provider_id"]) == ("sending", None)
    assert len(await worker.record([new], b"MSG_OK:new")) == 1
    assert await used(connection) == (1, 1, 1)


async def test_result_of_another_worker(
    database: str, connection: Connection, worker: Peer
) -> None:
    """Nobody records for a claim that is not theirs."""
    claim = await claimed(connection, worker)
    async with peer(database) as other:
        assert await other.record([claim]) == {}

    assert (await message(connection, claim["id"]))["status"] == "sending"


async def test_failures_grow_and_end(connection: Connection, worker: Peer) -> None:
    """Requests that never leave are counted in a row, and each waits as long as it is told."""
    claim = await claimed(connection, worker)
    for failures in (1, 2):
        await worker.record([claim], never_left("refused"), retry_in=0.001, failed=True)
        row = await message(connection, claim["id"])
        assert (row["failures"], row["attempts"]) == (failures, 0)
        assert row["retry_at"] > row["status_at"]
        claim = (await wait_for(lambda: sending(worker), "the claim"))[0]
        assert claim["failures"] == failures

    await worker.record([claim], b"MSG_OK")

    row = await message(connection, claim["id"])
    assert (row["failures"], row["retry_at"], row["error"]) == (0, None, None)


async def sending(worker: Peer) -> list[Record]:
    """What one more claim brings."""
    return (await worker.claim()).sending


async def test_send_after_is_the_users(connection: Connection, worker: Peer) -> None:
    """Whatever becomes of a message, its `send_after` stays as the user wrote it."""
    claim = await claimed(connection, worker)
    before = (await message(connection, claim["id"]))["send_after"]

    await worker.record([claim], never_left("refused"), retry_in=300, failed=True)

    assert (await message(connection, claim["id"]))["send_after"] == before
    assert await worker.ids() == []


async def test_last_answer_is_kept(connection: Connection, worker: Peer) -> None:
    """A later failure without an answer leaves the last answer that there was."""
    claim = await claimed(connection, worker)
    await worker.record([claim], b"LIMIT_DELAY")
    (again,) = (await worker.claim(1)).sending

    await worker.record([again], DOUBT)

    row = await message(connection, claim["id"])
    assert (row["status"], row["reply"], row["attempts"]) == ("unknown", "LIMIT_DELAY", 1)


# ------------------------------------------------------------------ answers that come late


@pytest.mark.parametrize(
    ("answer", "status", "counted"),
    [
        (b"MSG_OK:abc", "accepted", 1),
        (b"INVALID_PATTERN", "rejected", 1),
        (b"LIMIT_DAY", "pending", 0),
    ],
)
async def test_late_answer_to_a_message_in_doubt(
    connection: Connection, worker: Peer, answer: bytes, status: str, counted: int
) -> None:
    """An answer that comes after its worker was taken for dead still wins, and counts once."""
    claim = await claimed(connection, worker)
    await connection.execute("DELETE FROM worker WHERE id = $1", worker.worker_id)
    assert [row["id"] for row in await outbox.rescue(worker.session)] == [claim["id"]]
    assert (await message(connection, claim["id"]))["attempts"] == 1

    await worker.record([claim], answer)

    row = await message(connection, claim["id"])
    assert (row["status"], row["attempts"]) == (status, counted)
    assert await used(connection) == (int(status == "accepted"),) * 3


async def test_late_answer_before_it_is_claimed_again(connection: Connection, worker: Peer) -> None:
    """Given back for another try, a message is still the old claim's until it is claimed again."""
    claim = await claimed(connection, worker)
    await connection.execute("UPDATE outbox SET status = 'unknown', attempts = 1")
    await connection.execute("UPDATE service SET on_unknown = 'retry'")
    assert len(await outbox.retry_unknown(worker.session, 0)) == 1

    await worker.record([claim], b"MSG_OK:abc")

    row = await message(connection, claim["id"])
    assert (row["status"], row["provider_id"], row["attempts"]) == ("accepted", "abc", 1)
    assert await worker.ids() == []


@pytest.mark.parametrize("end", ["cancelled", "expired"])
async def test_late_refusal_of_what_has_ended(
    connection: Connection, worker: Peer, end: str
) -> None:
    """A late 'not now' does not bring back what the user has cancelled, or what has run out."""
    claim = await claimed(connection, worker)
    await connection.execute("UPDATE outbox SET status = $1, attempts = 1", end)

    await worker.record([claim], b"LIMIT_DAY")

    assert (await message(connection, claim["id"]))["status"] == end
    assert await used(connection) == (0, 0, 0)


async def test_cancelled_while_it_was_sent(connection: Connection, worker: Peer) -> None:
    """What a person asked to cancel meanwhile is cancelled if it did not go, and else accepted."""
    await add_messages(connection, 2)
    first, second = (await worker.claim()).sending
    await connection.execute("UPDATE outbox SET cancel = true")

    await worker.record([first], b"LIMIT_DELAY")
    await worker.record([second], b"MSG_OK")

    assert (await message(connection, first["id"]))["status"] == "cancelled"
    assert (await message(connection, second["id"]))["status"] == "accepted"


async def test_late_acceptance_of_what_has_ended(connection: Connection, worker: Peer) -> None:
    """What the provider has taken is accepted, whatever was thought of it meanwhile."""
    claim = await claimed(connection, worker)
    await connection.execute("UPDATE outbox SET status = 'expired', attempts = 1")

    await worker.record([claim], b"MSG_OK:abc")

    row = await message(connection, claim["id"])
    assert (row["status"], row["provider_id"], row["attempts"]) == ("accepted", "abc", 1)


# ------------------------------------------------------------------ what is given back


async def test_given_back_to_the_window_of_the_claim(connection: Connection, worker: Peer) -> None:
    """What is refused in a new window is given back to the one in which it was claimed."""
    claim = await claimed(connection, worker)
    await connection.execute("UPDATE outbox SET claimed_at = claimed_at - interval '40 days'")
    await connection.execute(
        """
        INSERT INTO quota_usage (service_id, period, window_start, used)
        SELECT 42, p, date_trunc(p, o.claimed_at, s.timezone), 5
        FROM outbox o, service s, unnest(ARRAY['day', 'week', 'month']) AS p
        """
    )

    await worker.record([claim], b"LIMIT_DELAY")

    assert await used(connection) == (1, 1, 1)
    old = await connection.fetch("SELECT used FROM quota_usage WHERE used NOT IN (1)")
    assert [row["used"] for row in old] == [4, 4, 4]


async def test_window_that_was_pruned(connection: Connection, worker: Peer) -> None:
    """A result is recorded even if the count of its window is gone."""
    claim = await claimed(connection, worker)
    await connection.execute("DELETE FROM quota_usage")

    assert len(await worker.record([claim], b"LIMIT_DELAY")) == 1


async def test_batch_of_many_services(connection: Connection, worker: Peer) -> None:
    """One batch gives each service back exactly what is its own."""
    for service in (1, 2, 3):
        await add_service(connection, service, timezone=midweek())
        await add_messages(connection, 4, service_id=service)
    rows = (await worker.claim({1: 4, 2: 4, 3: 4})).sending

    await outbox.record(
        worker.session,
        [
            worker.result(row, b"MSG_OK" if index % 4 < row["service_id"] else b"INVALID_MSISDN")
            for index, row in enumerate(rows)
        ],
    )

    assert [await used(connection, service) for service in (1, 2, 3)] == [
        (1, 1, 1),
        (2, 2, 2),
        (3, 3, 3),
    ]


async def test_batches_at_once_do_not_deadlock(database: str, connection: Connection) -> None:
    """Workers that claim and refuse for the same services in any order never block each other."""
    for service in range(1, 7):
        await add_service(connection, service, timezone=midweek(), day_limit=1000)
        await add_messages(connection, 40, service_id=service)

    async def work(turn: int) -> None:
        async with peer(database) as worker:
            order = list(range(1, 7)) if turn % 2 else list(range(6, 0, -1))
            for _ in range(10):
                rows = (await worker.claim(dict.fromkeys(order, 2))).sending
                await worker.record(rows[::-1] if turn % 2 else rows, b"LIMIT_DELAY")

    async with asyncio.TaskGroup() as group:
        for turn in range(4):
            group.create_task(work(turn))

    assert await statuses(connection) == {"pending": 240}
    assert {await used(connection, service) for service in range(1, 7)} == {(0, 0, 0)}


# ------------------------------------------------------------------ the pace comes back


async def test_success_takes_the_extra_delay_away(connection: Connection, worker: Peer) -> None:
    """Each accepted message shrinks the extra delay of its service, and a refusal does not."""
    await connection.execute("UPDATE service SET min_delay = '1 ms'")
    await add_messages(connection, 30)
    rows = (await worker.claim(30)).sending
    await services.slow(worker.session, rows[0]["id"], rows[0]["claim_no"])
    extra = "SELECT extract(epoch FROM extra_delay)::float8 FROM pace"
    slowed = await connection.fetchval(extra)

    await worker.record(rows[:10], b"INVALID_MSISDN")
    assert await connection.fetchval(extra) == slowed
    await worker.record(rows[10:20], b"MSG_OK")
    assert await connection.fetchval(extra) == pytest.approx(slowed * outbox.DECAY**10, rel=0.01)

    await connection.execute("UPDATE pace SET extra_delay = interval '40 microseconds'")
    await worker.record(rows[20:21], b"MSG_OK")
    assert await connection.fetchval(extra) == 0


async def test_wait_from_due_to_accepted(connection: Connection, worker: Peer) -> None:
    """The wait that is told of an accepted message begins when it was due, not when inserted."""
    claim = await claimed(connection, worker)
    await connection.execute(
        "UPDATE outbox SET created_at = now() - interval '2 h', send_after = now() - interval '1 h'"
    )

    (since,) = (await worker.record([claim])).values()

    assert since is not None
    assert timedelta(hours=1) <= timedelta(seconds=since) < timedelta(hours=1, minutes=1)


async def test_held(connection: Connection, worker: Peer) -> None:
    """What a worker's claims hold is told until it is recorded."""
    await add_messages(connection, 3)
    rows = (await worker.claim()).sending
    await worker.record(rows[:1])

    held = await outbox.held(worker.session, worker.worker_id)

    assert {(row["id"], row["claim_no"], row["service_id"]) for row in held} == {
        (row["id"], 1, SERVICE) for row in rows[1:]
    }
