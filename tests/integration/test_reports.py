from __future__ import annotations

import asyncio
import datetime as dt
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from dispatcher.db import reports
from dispatcher.db.pool import Session
from dispatcher.db.reports import Applied, Report
from dispatcher.domain.message import Status
from dispatcher.domain.reports import REPORTED, advance
from tests.builders import add_message, add_service

ENROUTE, DELIVERED, UNDELIVERABLE = Status.ENROUTE, Status.DELIVERED, Status.UNDELIVERABLE
WEEK = 604_800.0

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]


@pytest.fixture
async def session(database: str) -> AsyncIterator[Session]:
    """A session as the server has it."""
    async with Session(database, name="test", timeout=10) as session:
        yield session


async def accepted(connection: Connection, provider_id: str | None = "a", **columns: object) -> int:
    """Inserts an accepted message, with its service if that is not there; returns its id."""
    if not await connection.fetchval("SELECT count(*) FROM service"):
        await add_service(connection)
    return await add_message(
        connection, **{"status": "accepted", "provider_id": provider_id} | columns
    )


async def receive(
    session: Session, *told: tuple[str, Status | None], params: str = "{}"
) -> list[Applied]:
    """Stores reports given as identifier and status."""
    return await reports.receive(session, [Report(name, status, params) for name, status in told])


async def apply(session: Session) -> list[Applied]:
    """Looks once at all that waits."""
    return (await reports.apply(session, WEEK)).applied


async def status(connection: Connection, message_id: int) -> str:
    """A message's status."""
    value = await connection.fetchval("SELECT status FROM outbox WHERE id = $1", message_id)
    assert isinstance(value, str)
    return value


async def stored(connection: Connection) -> list[tuple[Any, ...]]:
    """All reports as (identifier, status, message), in the order they were stored."""
    rows = await connection.fetch(
        "SELECT provider_id, status, message_id FROM delivery_report ORDER BY received_at, id"
    )
    return [tuple(row) for row in rows]


async def test_a_report_moves_its_message(connection: Connection, session: Session) -> None:
    """A report is stored with its message, and the message takes its status."""
    message = await accepted(connection, status_at=_time(1))
    (applied,) = await receive(session, ("a", ENROUTE))
    assert (applied.message_id, applied.before) == (message, Status.ACCEPTED)
    assert await status(connection, message) == "enroute"
    assert await stored(connection) == [("a", "enroute", message)]
    assert await connection.fetchval("SELECT status_at > now() - interval '1 hour' FROM outbox")


async def test_all_that_came_is_kept(connection: Connection, session: Session) -> None:
    """The parameters of a report are stored as they were read."""
    params = {"sms_id": "a", "x": ["1", 'я"\\'], "": "\ufffd"}
    await receive(session, ("a", None), params=json.dumps(params))
    kept = await connection.fetchval("SELECT params FROM delivery_report")
    assert json.loads(kept) == params


async def test_an_unknown_identifier_is_kept_and_waits(
    connection: Connection, session: Session
) -> None:
    """A report for which there is no message is stored without one."""
    (applied,) = await receive(session, ("nobody", DELIVERED))
    assert applied.message_id is None
    assert await apply(session) == []
    assert await stored(connection) == [("nobody", "delivered", None)]


async def test_an_unknown_word_is_kept_with_its_message(
    connection: Connection, session: Session
) -> None:
    """A report whose word says nothing belongs to its message and leaves it as it is."""
    message = await accepted(connection)
    (applied,) = await receive(session, ("a", None))
    assert applied.message_id == message
    assert await stored(connection) == [("a", None, message)]
    assert await status(connection, message) == "accepted"


async def test_a_report_that_comes_early_is_applied_once_its_message_is_known(
    connection: Connection, session: Session
) -> None:
    """What waits is applied, once, when the identifier has been recorded."""
    message = await accepted(connection, None)
    await receive(session, ("a", ENROUTE), ("a", DELIVERED))
    assert await apply(session) == []
    await connection.execute("UPDATE outbox SET provider_id = 'a', accepted_at = now()")
    applied = await apply(session)
    assert [(a.status, a.message_id, a.before) for a in applied] == [
        (ENROUTE, message, Status.ACCEPTED),
        (DELIVERED, message, Status.ACCEPTED),
    ]
    assert await status(connection, message) == "delivered"
    assert await apply(session) == []


async def test_a_report_belongs_to_the_message_accepted_last(
    connection: Connection, session: Session
) -> None:
    """Of several messages under one identifier the one accepted last is meant."""
    late = await accepted(connection, accepted_at=_time(3))
    later = await accepted(connection, accepted_at=_time(3))
    early = await accepted(connection, accepted_at=_time(2))
    unknown = await accepted(connection, accepted_at=None)
    (applied,) = await receive(session, ("a", DELIVERED))
    assert applied.message_id == later
    others = [await status(connection, message) for message in (late, early, unknown)]
    assert others == ["accepted"] * 3


def _time(hour: int) -> dt.datetime:
    return dt.datetime(2026, 1, 1, hour, tzinfo=dt.UTC)


ORDERS = [
    [ENROUTE, DELIVERED],
    [DELIVERED, ENROUTE],
    [ENROUTE, ENROUTE, DELIVERED, DELIVERED],
    [UNDELIVERABLE, DELIVERED],
    [DELIVERED, UNDELIVERABLE],
    [None, ENROUTE, UNDELIVERABLE, ENROUTE, DELIVERED],
]


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("told", ORDERS, ids=lambda told: "-".join(s or "none" for s in told))
async def test_reports_doubled_late_or_swapped_never_move_a_message_backwards(
    connection: Connection, session: Session, told: Sequence[Status | None], size: int
) -> None:
    """In batches of any size the first end stays, and every report is kept."""
    message = await accepted(connection)
    for start in range(0, len(told), size):
        await receive(session, *[("a", one) for one in told[start : start + size]])
    ends = [one for one in told if one in (DELIVERED, UNDELIVERABLE)]
    assert await status(connection, message) == ends[0]
    assert await stored(connection) == [("a", one, message) for one in told]


@pytest.mark.parametrize("seed", range(5))
async def test_the_database_and_the_domain_agree(
    connection: Connection, session: Session, seed: int
) -> None:
    """Batches of reports leave every message where the rules of the domain put it."""
    chance = random.Random(seed)
    names = [f"id-{n}" for n in range(8)]
    messages = {name: await accepted(connection, None) for name in names}
    expected = dict.fromkeys(names, Status.ACCEPTED)
    for name in names:
        if chance.random() < 0.5:
            await _record(connection, messages[name], name)
    for _ in range(6):
        told = [(chance.choice(names), chance.choice(sorted(REPORTED))) for _ in range(5)]
        for name, reported in told:
            expected[name] = advance(expected[name], reported)
        await receive(session, *told)
    for name in names:
        await _record(connection, messages[name], name)
    await apply(session)
    actual = {name: await status(connection, messages[name]) for name in names}
    assert actual == expected


async def _record(connection: Connection, message: int, name: str) -> None:
    await connection.execute(
        "UPDATE outbox SET provider_id = $2 WHERE id = $1 AND provider_id IS NULL", message, name
    )


@pytest.mark.parametrize(
    "state", ["pending", "sending", "rejected", "expired", "cancelled", "unknown"]
)
async def test_a_message_without_an_identifier_is_never_touched(
    connection: Connection, session: Session, state: str
) -> None:
    """Reports move only what the provider has accepted."""
    held = {"worker_id": 1, "claimed_at": _time(1)} if state == "sending" else {}
    message = await accepted(connection, None, status=state, **held)
    (applied,) = await receive(session, ("a", DELIVERED))
    assert applied.message_id is None
    assert await status(connection, message) == state


async def test_a_locked_message_keeps_no_report_from_being_stored(
    database: str, connection: Connection, session: Session
) -> None:
    """While somebody holds the message its report is stored at once, and applied afterwards."""
    message = await accepted(connection)
    other = await asyncpg.connect(database)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("UPDATE outbox SET priority = 1")
    (applied,) = await receive(session, ("a", DELIVERED))
    assert applied.message_id is None
    assert await apply(session) == []
    await transaction.commit()
    await other.close()
    (applied,) = await apply(session)
    assert applied.message_id == message
    assert await status(connection, message) == "delivered"


async def test_several_processes_share_what_waits(
    database: str, connection: Connection, session: Session
) -> None:
    """Applied by four at once, each report is applied once and each message comes to its end."""
    messages = [await accepted(connection, None) for _ in range(60)]
    for n, _ in enumerate(messages):
        await receive(session, (f"id-{n}", ENROUTE), (f"id-{n}", DELIVERED))
    await connection.execute(
        "UPDATE outbox SET provider_id = 'id-' || (id - $1)::text", min(messages)
    )
    sessions = [Session(database, name=f"test {n}", timeout=10) for n in range(4)]
    try:
        applied: list[Applied] = []
        while len(applied) < 2 * len(messages):
            for found in await asyncio.gather(*map(apply, sessions)):
                applied += found
    finally:
        for one in sessions:
            await one.close()
    assert len(applied) == 2 * len(messages)
    assert await connection.fetchval("SELECT count(*) FROM outbox WHERE status = 'delivered'") == 60


async def test_stores_and_looks_at_once_never_fail_each_other(
    database: str, connection: Connection
) -> None:
    """Stores of the same identifiers in any order, and looks between them, cause no deadlock."""
    messages = [await accepted(connection, f"id-{n}") for n in range(20)]
    sessions = [Session(database, name=f"test {n}", timeout=10) for n in range(4)]

    async def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(15):
            names = chance.sample(range(20), 20)
            await receive(sessions[seed], *[(f"id-{n}", DELIVERED) for n in names])
            await apply(sessions[seed])

    try:
        await asyncio.gather(*map(work, range(4)))
        while await apply(sessions[0]):
            continue
    finally:
        for one in sessions:
            await one.close()
    assert [await status(connection, message) for message in messages] == ["delivered"] * 20
    assert await connection.fetchval("SELECT count(*) FROM delivery_report") == 4 * 15 * 20
    assert not await connection.fetchval(
        "SELECT count(*) FROM delivery_report WHERE message_id IS NULL"
    )


async def test_what_waits_is_looked_at_in_steps(
    connection: Connection, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look takes the newest, tells how far it came, and goes on from there to the very first."""
    monkeypatch.setattr(reports, "LOOK", 10)
    await accepted(connection, "id-1")
    await connection.execute(
        """
        INSERT INTO delivery_report (provider_id, status, received_at)
        SELECT 'id-' || n, 'delivered', now() - interval '1 hour' + n * interval '1 second'
        FROM generate_series(1, 35) AS n
        """
    )
    looks = [await reports.apply(session, WEEK)]
    while looks[-1].oldest is not None:
        looks.append(await reports.apply(session, WEEK, looks[-1].oldest))
    assert [len(look.applied) for look in looks] == [0, 0, 0, 1]
    assert looks[0].waiting == 10
    assert (await reports.apply(session, 1800.0)).waiting == 0


async def test_reports_are_matched_without_reading_the_whole_outbox(
    connection: Connection, session: Session
) -> None:
    """Storing and looking find messages by their identifier, however many there are."""
    await accepted(connection)
    await connection.execute(
        """
        INSERT INTO outbox (service_id, msisdn, text, status, provider_id)
        SELECT 42, '359881234567', 'x', 'delivered', 'id-' || n
        FROM generate_series(1, 20000) AS n;
        INSERT INTO delivery_report (provider_id, status, message_id)
        SELECT 'id-' || n, 'delivered', n FROM generate_series(1, 20000) AS n;
        INSERT INTO delivery_report (provider_id, status)
        SELECT 'none-' || n, 'delivered' FROM generate_series(1, 200) AS n;
        ANALYZE outbox, delivery_report;
        """
    )
    plans = [
        await _plan(connection, reports._RECEIVE, "ARRAY['a'], ARRAY['enroute'], ARRAY['{}']"),
        await _plan(connection, reports._APPLY, "900, NULL, 5000"),
    ]
    for plan in plans:
        assert "outbox_provider_id" in plan
        assert "Seq Scan on outbox" not in plan
    assert "delivery_report_waiting" in plans[1]
    assert "Seq Scan on delivery_report" not in plans[1]


async def _plan(connection: Connection, statement: str, arguments: str) -> str:
    """The plan that a statement gets whatever its arguments, as text."""
    await connection.execute("SET plan_cache_mode = force_generic_plan; DEALLOCATE ALL")
    await connection.execute(f"PREPARE asked AS {statement}")
    rows = await connection.fetch(f"EXPLAIN EXECUTE asked ({arguments})")
    return "\n".join(row[0] for row in rows)
