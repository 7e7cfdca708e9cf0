from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import aiohttp
import asyncpg
import pytest

from dispatcher import intake
from dispatcher.db import reports
from tests.builders import add_message, add_messages, add_service
from tests.integration.test_server_metrics import scraped
from tests.serving import Serving, serving, shut, until

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]


@pytest.fixture
async def it(database: str, connection: Connection) -> AsyncIterator[Serving]:
    """A server with the usual settings, and a service."""
    await add_service(connection)
    async with serving(database) as it:
        yield it


async def sent(connection: Connection) -> int:
    """Inserts a message whose answer is not recorded yet; returns its id."""
    now = await connection.fetchval("SELECT clock_timestamp()")
    return await add_message(connection, status="sending", worker_id=1, claimed_at=now)


async def record(connection: Connection, message: int, identifier: str) -> None:
    """Records the acceptance of a message."""
    await connection.execute(
        "UPDATE outbox SET status = 'accepted', provider_id = $2, accepted_at = clock_timestamp() "
        "WHERE id = $1",
        message,
        identifier,
    )


async def status(connection: Connection, message: int) -> str:
    """A message's status."""
    value = await connection.fetchval("SELECT status FROM outbox WHERE id = $1", message)
    assert isinstance(value, str)
    return value


async def becomes(connection: Connection, message: int, wanted: str) -> None:
    """Waits for a message's status."""

    async def there() -> bool:
        return await status(connection, message) == wanted

    await until(there)


async def count(connection: Connection) -> int:
    """The number of reports stored."""
    value = await connection.fetchval("SELECT count(*) FROM delivery_report")
    assert isinstance(value, int)
    return value


# ------------------------------------------------------------------------------------- the way in


async def test_a_report_is_durable_and_applied_before_ok(
    it: Serving, connection: Connection
) -> None:
    """When OK has come, report and status are seen by everybody, and the log tells both."""
    message = await sent(connection)
    await record(connection, message, "a")
    assert await it.report("a", "ENROUTE") == 200
    assert await status(connection, message) == "enroute"
    assert await it.report("a") == 200
    assert await status(connection, message) == "delivered"
    assert await count(connection) == 2
    assert [
        (line["id"], line["provider_id"], line["status"], line["word"], line["late"])
        for line in it.told("report.received")
    ] == [
        (message, "a", "enroute", "ENROUTE", False),
        (message, "a", "delivered", "DELIVRD", False),
    ]


async def test_a_late_end_is_kept_and_told(it: Serving, connection: Connection) -> None:
    """A delivery reported after the message was undeliverable is stored, and told to be late."""
    message = await sent(connection)
    await record(connection, message, "a")
    for word in ("UNDELIV", "DELIVRD", "UNDELIV", "ENROUTE"):
        assert await it.report("a", word) == 200
    assert await status(connection, message) == "undeliverable"
    assert await count(connection) == 4
    lines = it.told("report.received")
    assert [line["late"] for line in lines] == [False, True, True, True]
    assert {line["message_status"] for line in lines} == {"undeliverable"}


async def test_an_unknown_identifier_is_taken_and_counted(
    it: Serving, connection: Connection
) -> None:
    """A report for which no message is known is answered OK, stored, told and counted."""
    assert await it.report("nobody") == 200
    assert await count(connection) == 1
    (line,) = it.told("report.received")
    assert (line["id"], line["message_status"], line["late"]) == (None, None, False)
    families = await scraped(it)
    assert families["dispatcher_reports_unmatched"] == {(): 1.0}
    assert families["dispatcher_reports"] == {("delivered",): 1.0}
    assert families["dispatcher_reports_waiting"] == {(): 1.0}


async def test_deliveries_are_timed(it: Serving, connection: Connection) -> None:
    """The wait from acceptance to handset is counted once for each message delivered."""
    message = await sent(connection)
    await record(connection, message, "a")
    for word in ("ENROUTE", "DELIVRD", "DELIVRD"):
        await it.report("a", word)
    waits = (await scraped(it))["dispatcher_accepted_to_delivered_seconds"]
    assert waits["+Inf",] == 1


# ------------------------------------------------------------------------------------- early ones


async def test_an_early_report_is_applied_by_itself(it: Serving, connection: Connection) -> None:
    """Reports that come before the answer is recorded are applied soon after it is."""
    message = await sent(connection)
    assert await it.report("a", "ENROUTE") == 200
    assert await it.report("a") == 200
    assert await status(connection, message) == "sending"
    await record(connection, message, "a")
    await becomes(connection, message, "delivered")
    await until(lambda: len(it.told("report.applied")) == 2)
    first, second = it.told("report.applied")
    assert [first["id"], second["id"]] == [message, message]
    assert [first["message_status"], second["message_status"]] == ["enroute", "delivered"]
    assert first["waited"] > 0


async def test_an_early_report_is_applied_at_a_hint(
    database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told that identifiers were recorded, the server does not wait for its next look."""
    monkeypatch.setattr(intake, "LOOK", 3600.0)
    monkeypatch.setattr(intake, "SHARE", 0)
    await add_service(connection)
    async with serving(database) as it:
        message = await sent(connection)
        await it.report("a")
        await until(lambda: not it.server._intake._look_now.is_set())
        await record(connection, message, "a")
        it.server.accepted()
        await becomes(connection, message, "delivered")


async def test_what_waited_before_the_start_is_applied(
    database: str, connection: Connection
) -> None:
    """Reports of days ago whose answer was recorded since then are looked at too."""
    await add_service(connection)
    message = await sent(connection)
    await connection.execute(
        "INSERT INTO delivery_report (provider_id, status, received_at) "
        "VALUES ('a', 'delivered', now() - interval '5 days')"
    )
    await record(connection, message, "a")
    async with serving(database):
        await becomes(connection, message, "delivered")


async def test_early_reports_are_found_among_many_that_wait(
    database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More reports of strangers than one look takes hide none that is ours."""
    monkeypatch.setattr(reports, "LOOK", 10)
    monkeypatch.setattr(intake, "LOOK", 0.01)
    monkeypatch.setattr(intake, "REST", 0.01)
    await add_service(connection)
    message = await sent(connection)
    async with serving(database) as it:
        await it.report("a")
        await asyncio.gather(*[it.report(f"stranger-{n}") for n in range(55)])
        await until(lambda: it.server._intake._sweep is not None)
        await record(connection, message, "a")
        await becomes(connection, message, "delivered")


async def test_without_anything_that_waits_the_database_is_left_alone(
    it: Serving, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks end when nothing waits any more."""
    monkeypatch.setattr(intake, "LOOK", 0.02)
    monkeypatch.setattr(intake, "REST", 0.01)
    message = await sent(connection)
    await record(connection, message, "a")
    await it.report("a")

    async def looks() -> object:
        return await connection.fetchval(
            "SELECT query_start FROM pg_stat_activity WHERE application_name = $1 "
            "AND datname = current_database()",
            "dispatcher late reports",
        )

    await until(lambda: it.server._intake._sweep is None)
    last = None

    async def rests() -> bool:
        nonlocal last
        before, last = last, await looks()
        await asyncio.sleep(10 * intake.LOOK)
        return last is not None and last == before

    await until(rests)


# ------------------------------------------------------------------------------------- many at once


async def test_many_reports_at_once_are_all_taken(it: Serving, connection: Connection) -> None:
    """1,500 at once, two for each message, are stored in a few statements, and all are applied."""
    messages = await add_messages(connection, 750)
    await connection.execute(
        "UPDATE outbox SET status = 'accepted', provider_id = 'id-' || (id - $1)::text",
        messages[0],
    )
    answers = await asyncio.gather(
        *[it.report(f"id-{n}", word) for n in range(750) for word in ("ENROUTE", "DELIVRD")]
    )
    assert set(answers) == {200}
    assert await count(connection) == 1500
    assert await connection.fetchval("SELECT count(DISTINCT xmin::text) FROM delivery_report") < 300

    async def delivered() -> bool:
        return not await connection.fetchval(
            "SELECT count(*) FROM outbox WHERE status <> 'delivered'"
        )

    await until(delivered)


async def test_a_single_sender_is_not_made_to_wait(
    it: Serving, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One report after the other is stored at once; only a crowd is made to gather."""
    monkeypatch.setattr(intake, "GATHER", 3600.0)
    for _ in range(5):
        assert await it.report("a") == 200
    await asyncio.gather(*[it.report("a") for _ in range(intake.CROWD + 1)])
    assert await count(connection) == 5 + intake.CROWD + 1


async def test_a_full_queue_refuses_quickly(
    database: str,
    it: Serving,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the table is held, what exceeds the queue gets 503 and the rest waits for its turn."""
    monkeypatch.setattr(intake, "QUEUE", 3)
    holder = await asyncpg.connect(database)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("LOCK TABLE delivery_report")
    first = asyncio.create_task(it.report("first"))
    await until(lambda: not it.server._intake._queue and _under_way(it) == 1)
    waiting = [asyncio.create_task(it.report(f"waits-{n}")) for n in range(3)]
    await until(lambda: len(it.server._intake._queue) == 3)
    assert await it.report("one too many") == 503
    await transaction.rollback()
    await holder.close()
    assert await asyncio.gather(first, *waiting) == [200] * 4
    assert await count(connection) == 4
    (line,) = it.told("report.refused")
    assert line["reason"] == "too many at once"


def _under_way(it: Serving) -> int:
    assert it.server._runner is not None
    assert it.server._runner.server is not None
    return sum(one._request_in_progress for one in it.server._runner.server.connections)


# ------------------------------------------------------------------------------------- losses


async def test_without_a_database_reports_are_refused_until_it_is_back(
    it: Serving, connection: Connection
) -> None:
    """503 while it is away, at once from the second on, and 200 when it is back."""
    assert await it.report("a") == 200
    await shut(connection, away=True)
    assert await it.report("a") == 503
    assert set(await asyncio.gather(*[it.report("a") for _ in range(20)])) == {503}
    async with it.client.get(it.url("/healthz")) as answer:
        assert answer.status == 200
    await shut(connection, away=False)
    await it.takes()
    assert await it.report("a") == 200
    assert await count(connection) == 2
    (line, *_) = it.told("report.refused")
    assert (line["reason"], line["status"]) == ("database away", 503)


async def test_before_the_database_was_reached_reports_are_refused(
    database: str, connection: Connection
) -> None:
    """A server whose `run` has not begun says 503 rather than let anybody wait."""
    async with serving(database) as it:
        assert it.running is not None
        it.running.cancel()
        await asyncio.wait([it.running])
        it.server._intake._away = True
        assert await it.report("a") == 503
    assert await count(connection) == 0


async def test_early_reports_survive_a_loss_of_the_database(
    it: Serving, connection: Connection
) -> None:
    """What waited when the database went away is applied when it is back."""
    message = await sent(connection)
    assert await it.report("a") == 200
    await shut(connection, away=True)
    await record(connection, message, "a")
    await shut(connection, away=False)
    await becomes(connection, message, "delivered")


async def test_what_no_waiting_mends_is_told(it: Serving, connection: Connection) -> None:
    """A database that refuses the statement gets reports refused and the log told, no more."""
    await connection.execute("ALTER TABLE delivery_report RENAME TO elsewhere")
    assert await it.report("a") == 503
    line, *_ = it.told("report.failed")
    assert line["reason"] == 'Relation "delivery_report" does not exist.'
    await connection.execute("ALTER TABLE elsewhere RENAME TO delivery_report")
    await it.takes()
    assert await it.report("a") == 200


# ------------------------------------------------------------------------------------- the end


async def test_closing_stores_what_has_come(
    database: str, it: Serving, connection: Connection
) -> None:
    """At the end requests under way are finished, new ones find nobody, and `run` ends."""
    await _closes_while_held(database, it, connection)


async def test_closing_stores_what_has_come_even_when_run_was_cancelled(
    database: str, it: Serving, connection: Connection
) -> None:
    """A `run` that is cancelled first leaves nothing behind that is not stored."""
    await it.report("a")
    assert it.running is not None
    it.running.cancel()
    await asyncio.wait([it.running])
    await _closes_while_held(database, it, connection)


async def _closes_while_held(database: str, it: Serving, connection: Connection) -> None:
    holder = await asyncpg.connect(database)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("LOCK TABLE delivery_report IN SHARE MODE")
    before = await count(connection)
    under_way = [asyncio.create_task(it.report(f"id-{n}")) for n in range(5)]
    await until(lambda: _under_way(it) == 5)
    closing = asyncio.create_task(it.server.close())
    await until(lambda: _refuses_connections(it))
    assert not closing.done()
    await transaction.rollback()
    await holder.close()
    assert await asyncio.gather(*under_way) == [200] * 5
    await closing
    assert it.running is not None
    await asyncio.wait([it.running])
    assert await count(connection) == before + 5


async def _refuses_connections(it: Serving) -> bool:
    try:
        await it.get("/healthz")
    except aiohttp.ClientConnectionError:
        return True
    return False


async def test_a_report_whose_storing_was_cut_short_is_stored_again(
    database: str, it: Serving, connection: Connection
) -> None:
    """A `run` that is cancelled inside a statement gives its reports back to be stored."""
    holder = await asyncpg.connect(database)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("LOCK TABLE delivery_report IN SHARE MODE")
    under_way = asyncio.create_task(it.report("a"))
    await until(lambda: _under_way(it) == 1 and not it.server._intake._queue)
    assert it.running is not None
    it.running.cancel()
    await asyncio.wait([it.running])
    await transaction.rollback()
    await holder.close()
    await it.server.close()
    assert await under_way == 200
    assert await count(connection) == 1
