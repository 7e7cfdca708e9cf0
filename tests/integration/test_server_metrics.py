from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dispatcher import server as serverside
from dispatcher.db import gauges
from dispatcher.db.pool import Session
from dispatcher.metrics import GAUGES
from tests.builders import add_message, add_messages, add_service
from tests.serving import Serving, serving, shut, until

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

Families = dict[str, dict[tuple[str, ...], float]]


async def scraped(it: Serving) -> Families:
    """What a scrape brings: values by family and by labels, in the order of the labels' names."""
    async with it.client.get(it.url("/metrics")) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await answer.text()
    return {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


@pytest.fixture
async def session(database: str) -> AsyncIterator[Session]:
    """A session as the server has it."""
    async with Session(database, name="test", timeout=10) as session:
        yield session


async def asked(session: Session) -> Families:
    """What the database tells: values by name and by labels, in the order of `GAUGES`."""
    families: Families = {}
    for sample in await gauges.read(session):
        families.setdefault(sample.name, {})[sample.labels] = sample.value
    return families


async def test_a_scrape_has_what_the_process_and_the_database_know(
    database: str, connection: Connection
) -> None:
    """Counters of the process and gauges of the database come in one answer."""
    await add_service(connection)
    await add_messages(connection, 3)
    async with serving(database) as it:
        it.metrics.outcomes(1, 42, "accepted", "MSG_OK")
        families = await scraped(it)
    assert families["dispatcher_messages"] == {("accepted", "42"): 1.0}
    assert families["dispatcher_pending"] == {("42",): 3.0}
    assert families["dispatcher_database_up"] == {(): 1.0}


async def test_messages_are_counted_by_service_and_state(
    connection: Connection, session: Session
) -> None:
    """What waits, is held or is in doubt is counted for each service, also where there is none."""
    await add_service(connection)
    await add_service(connection, 43)
    await add_messages(connection, 2)
    await add_messages(connection, 3, service_id=43)
    await add_messages(connection, 4, status="unknown")
    await add_messages(connection, 5, status="delivered")
    await connection.execute(
        "UPDATE outbox SET status = 'sending', worker_id = 1, claimed_at = now() "
        "WHERE id = (SELECT min(id) FROM outbox)"
    )
    families = await asked(session)
    assert families["dispatcher_pending"] == {("42",): 1, ("43",): 3}
    assert families["dispatcher_sending"] == {("42",): 1, ("43",): 0}
    assert families["dispatcher_in_doubt"] == {("42",): 4, ("43",): 0}


async def test_the_oldest_due_message_is_found_in_any_priority(
    connection: Connection, session: Session
) -> None:
    """What is not due yet does not count; a retry is due when its own time comes."""
    await add_service(connection)
    await add_service(connection, 43)
    for priority, due in [(5, "-10 s"), (0, "-100 s"), (-3, "-50 s"), (9, "1 h")]:
        message = await add_message(connection, priority=priority)
        await connection.execute(
            "UPDATE outbox SET send_after = now() + $2::text::interval WHERE id = $1", message, due
        )
    await add_message(connection, service_id=43)
    await connection.execute(
        "UPDATE outbox SET retry_at = now() + interval '1 h', send_after = now() - interval '1 h' "
        "WHERE service_id = 43"
    )
    ages = (await asked(session))["dispatcher_oldest_due_age_seconds"]
    assert 100 <= ages["42",] < 150
    assert ages["43",] == 0


async def test_quotas_are_told_with_their_limits_and_windows(
    connection: Connection, session: Session
) -> None:
    """Used, limit, the provider's word and the next window, for each service and period."""
    await add_service(connection, day_limit=10, month_limit=200, timezone="Asia/Kathmandu")
    await connection.execute(
        """
        INSERT INTO quota_usage (service_id, period, window_start, used, closed_until)
        SELECT 42, period, date_trunc(period, now() + days * interval '1 day', 'Asia/Kathmandu'),
            used, until
        FROM (VALUES
            ('day', 0, 7, now() + interval '1 hour'), ('day', -1, 9, now() + interval '1 hour'),
            ('week', 0, 20, now() - interval '1 hour')
        ) AS v (period, days, used, until)
        """
    )
    families = await asked(session)
    windows = [("42", period) for period in ("day", "week", "month")]
    assert [families["dispatcher_quota_used"][window] for window in windows] == [7, 20, 0]
    assert families["dispatcher_quota_limit"] == {("42", "day"): 10, ("42", "month"): 200}
    assert [families["dispatcher_quota_closed"][window] for window in windows] == [1, 0, 0]
    expected = await connection.fetchrow(
        """
        SELECT
            extract(epoch FROM (local + interval '1 day') AT TIME ZONE zone)::float8,
            extract(epoch FROM (date_trunc('week', local) + interval '1 week')
                AT TIME ZONE zone)::float8,
            extract(epoch FROM (date_trunc('month', local) + interval '1 month')
                AT TIME ZONE zone)::float8
        FROM (SELECT date_trunc('day', now() AT TIME ZONE 'Asia/Kathmandu'), 'Asia/Kathmandu')
            AS t (local, zone)
        """
    )
    assert expected is not None
    next_windows = families["dispatcher_quota_next_window_timestamp_seconds"]
    assert [next_windows[window] for window in windows] == list(expected)


async def test_bans_blocks_and_workers_are_told(connection: Connection, session: Session) -> None:
    """What is closed, for whom and until when, and how many workers each egress has."""
    await add_service(connection, paused=True)
    await add_service(connection, 43)
    await connection.execute(
        """
        UPDATE service SET blocked_until = now(), blocked_reason = 'x' WHERE service_id = 43;
        INSERT INTO egress (name, banned_until, ban_wait, ill_until, ill_wait) VALUES
            ('a', to_timestamp(4000000000), '1 min', NULL, NULL),
            ('b', NULL, NULL, to_timestamp(4000000001), '1 min'),
            ('c', NULL, NULL, NULL, NULL);
        INSERT INTO egress_service (egress, service_id, blocked_until, blocked_reason) VALUES
            ('a', 42, now(), 'x'), ('b', 42, NULL, NULL);
        INSERT INTO worker (egress, host, pid, version, lease, lease_until) VALUES
            ('c', 'h', 1, '1', '1 min', now() + interval '1 min'),
            ('c', 'h', 2, '1', '1 min', now() + interval '1 min'),
            ('c', 'h', 3, '1', '1 min', now() - interval '1 min');
        """
    )
    families = await asked(session)
    assert families["dispatcher_service_paused"] == {("42",): 1, ("43",): 0}
    assert families["dispatcher_service_blocked"] == {("42",): 0, ("43",): 1}
    assert families["dispatcher_egress_service_blocked"] == {("a", "42"): 1, ("b", "42"): 0}
    assert families["dispatcher_egress_banned"] == {("a",): 1, ("b",): 0, ("c",): 0}
    assert families["dispatcher_egress_ill"] == {("a",): 0, ("b",): 1, ("c",): 0}
    assert families["dispatcher_egress_probe_timestamp_seconds"] == {("a",): 4e9, ("b",): 4e9 + 1}
    assert families["dispatcher_workers"] == {("a",): 0, ("b",): 0, ("c",): 2}


async def test_reports_that_wait_are_counted_for_a_week(
    connection: Connection, session: Session
) -> None:
    """Those matched and those given up are not counted."""
    await connection.execute(
        """
        INSERT INTO delivery_report (provider_id, received_at, message_id) VALUES
            ('a', now(), NULL), ('b', now() - interval '6 days', NULL),
            ('c', now() - interval '8 days', NULL), ('d', now(), 1)
        """
    )
    assert (await asked(session))["dispatcher_reports_waiting"] == {(): 2}


async def test_every_gauge_of_the_database_is_described(
    connection: Connection, session: Session
) -> None:
    """Names and numbers of labels are those that the metrics describe, and none is left out."""
    await test_bans_blocks_and_workers_are_told(connection, session)
    await connection.execute("UPDATE service SET day_limit = 1")
    families = await asked(session)
    assert families.keys() == GAUGES.keys()
    for name, family in families.items():
        assert {len(labels) for labels in family} == {len(GAUGES[name].labels)}


async def test_gauges_are_asked_for_seldom(
    database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scrapes in quick succession cost the database one statement; later ones ask anew."""
    await add_service(connection)
    monkeypatch.setattr(serverside, "FRESH", 3600.0)
    monkeypatch.setattr(serverside, "STALE", 3600.0)
    async with serving(database) as it:
        assert (await scraped(it))["dispatcher_pending"] == {("42",): 0}
        await add_messages(connection, 3)
        assert (await scraped(it))["dispatcher_pending"] == {("42",): 0}
        it.server._scrapes._ask_at = 0
        assert (await scraped(it))["dispatcher_pending"] == {("42",): 3}


async def test_a_scrape_answers_while_the_database_is_away(
    database: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process still tells its counts, and that the database is away, and recovers."""
    monkeypatch.setattr(serverside, "FRESH", 0.0)
    monkeypatch.setattr(serverside, "SHARE", 0)
    await add_service(connection)
    async with serving(database) as it:
        it.metrics.outcomes(1, 42, "accepted", "MSG_OK")
        await shut(connection, away=True)
        families = await scraped(it)
        assert families["dispatcher_database_up"] == {(): 0.0}
        assert families["dispatcher_messages"] == {("accepted", "42"): 1.0}
        assert "dispatcher_pending" not in families
        await shut(connection, away=False)

        async def up() -> bool:
            return (await scraped(it))["dispatcher_database_up"] == {(): 1.0}

        await until(up)


async def test_a_statement_that_the_database_refuses_is_told(
    database: str, connection: Connection
) -> None:
    """Without the right to read a table the scrape answers, and the log says why."""
    async with serving(database) as it:
        await connection.execute("ALTER TABLE egress RENAME TO elsewhere")
        assert (await scraped(it))["dispatcher_database_up"] == {(): 0.0}
        (line,) = it.told("metrics.failed")
        assert line["reason"] == 'Relation "egress" does not exist.'


async def test_a_scrape_does_not_read_what_is_finished(connection: Connection) -> None:
    """Finished messages, however many, are not touched by the statement of a scrape."""
    await add_service(connection)
    await connection.execute(
        """
        INSERT INTO outbox (service_id, msisdn, text, status)
        SELECT 42, '359881234567', 'x', CASE WHEN n % 100 = 0 THEN 'pending' ELSE 'delivered' END
        FROM generate_series(1, 20000) AS n;
        INSERT INTO delivery_report (provider_id, message_id)
        SELECT n::text, CASE WHEN n % 100 > 0 THEN n END FROM generate_series(1, 20000) AS n;
        ANALYZE outbox, delivery_report;
        """
    )
    rows = await connection.fetch(f"EXPLAIN {gauges._GAUGES}")
    plan = "\n".join(row[0] for row in rows)
    assert "Seq Scan on outbox" not in plan
    assert "Seq Scan on delivery_report" not in plan
    for index in ("outbox_due", "outbox_held", "outbox_in_doubt", "delivery_report_waiting"):
        assert index in plan
