"""The plans of the hot statements on a big table: nothing they do may grow with what is in it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from dispatcher.db import outbox, quota, services
from dispatcher.db.pool import Record, Session
from dispatcher.domain.outcomes import classify
from tests.builders import SERVICE
from tests.integration.peers import Connection, Peer, peer

Plan = dict[str, Any]

ROWS = 60_000

FILL_SERVICES = """
INSERT INTO service (service_id, user_id, day_limit, min_delay, on_unknown)
SELECT n, 7, 1000000, '1 ms', CASE WHEN n % 2 = 0 THEN 'retry' ELSE 'hold' END
FROM generate_series(1, 50) AS n
"""

# Mostly done, as after months: among the delivered lie a few of each state that is alive.
SETTLED = f"""
INSERT INTO outbox (
    service_id, msisdn, text, status, priority, provider_id, worker_id, claimed_at, accepted_at,
    expires_at, created_at, send_after, status_at)
SELECT
    1 + n % 50, '359881234567', 'x', s.status, n % 3,
    CASE WHEN s.status = 'delivered' THEN n::text END,
    CASE WHEN s.status = 'sending' THEN 1 END,
    CASE WHEN s.status IN ('sending', 'delivered') THEN now() END,
    CASE WHEN s.status = 'delivered' THEN now() END,
    CASE WHEN n % 7 = 0 THEN now() + (n % 1000 - 20) * interval '1 s' END,
    now() - interval '1 d', now() - interval '1 d', now() - interval '1 d'
FROM generate_series(1, {ROWS}) AS n
CROSS JOIN LATERAL (SELECT CASE
    WHEN n % 60 = 0 THEN 'pending' WHEN n % 301 = 0 THEN 'sending' WHEN n % 307 = 0 THEN 'unknown'
    ELSE 'delivered' END) AS s (status)
"""  # noqa: S608 - a number of this module

# One service has sent nothing for a while, half of what waits is not due, and the rest is little.
BACKLOG = f"""
INSERT INTO outbox (
    service_id, msisdn, text, status, priority, worker_id, claimed_at, expires_at, send_after)
SELECT
    CASE WHEN n % 100 = 0 THEN 1 + n % 50 ELSE {SERVICE} END, '359881234567', 'x', s.status, n % 5,
    CASE WHEN s.status = 'sending' THEN 1 END,
    CASE WHEN s.status = 'sending' THEN now() END,
    now() + interval '1 h',
    CASE WHEN n % 2 = 0 THEN now() + interval '1 d' ELSE now() - interval '1 h' END
FROM generate_series(1, {ROWS}) AS n
CROSS JOIN LATERAL (SELECT CASE
    WHEN n % 300 = 0 THEN 'sending' WHEN n % 50 = 0 THEN 'unknown' ELSE 'pending' END
) AS s (status)
"""  # noqa: S608 - numbers of this module


class Explaining(Session):
    """Instead of running a statement it keeps its plan, as for these values and as for any."""

    def __init__(self, dsn: str, *, planned_once: bool = False) -> None:
        super().__init__(dsn, name="test", timeout=60, planned_once=planned_once)
        self.plans: list[Plan] = []

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        """Plan the statement twice; nothing comes of it."""
        async with self.transaction() as connection:
            planned = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *args)
            self.plans.append(json.loads(planned)[0]["Plan"])
            values = ", ".join(_literal(argument) for argument in args)
            await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            await connection.execute(f"PREPARE generic AS {sql}")
            execute = f"EXECUTE generic ({values})" if args else "EXECUTE generic"
            planned = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {execute}")
            self.plans.append(json.loads(planned)[0]["Plan"])
            await connection.execute("DEALLOCATE generic")
        return []


class Measuring(Session):
    """Runs each statement, takes it back, and keeps how many pages it has touched."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, name="test", timeout=60)
        self.pages = 0

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        """Run the statement for its cost only."""
        async with self.transaction() as connection:
            undone = connection.transaction()
            await undone.start()
            # What is planned anew each time reads catalogues; only the second run is like many.
            for _ in range(2):
                told = await connection.fetchval(
                    f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {sql}", *args
                )
                plan = json.loads(told)[0]["Plan"]
                self.pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
                await undone.rollback()
                undone = connection.transaction()
                await undone.start()
            await undone.rollback()
        return []


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(_literal(item).strip("'") for item in value) + "}'"
    return f"'{value}'"


def nodes(plan: Plan) -> Iterator[Plan]:
    """A plan and all its parts."""
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


STATEMENTS: dict[str, Callable[[Session, Peer], Awaitable[object]]] = {
    "waiting": lambda session, _: outbox.waiting(session, "default"),
    "claim": lambda session, worker: outbox.claim(
        session, worker.worker_id, {SERVICE: 10, 7: 10, 8: 10}
    ),
    "claim from the heads": lambda session, worker: outbox.claim(
        session,
        worker.worker_id,
        {SERVICE: 10, 7: 10, 8: 10},
        heads={SERVICE: {0: ("2026-01-01 00:00:00+00", 1)}, 7: {0: ("-infinity", 1)}},
    ),
    "read_numbers": lambda session, _: outbox.read_numbers(
        session, {(5, "088 123 4567"): "359881234567", (6, "none"): None}
    ),
    "record": lambda session, worker: outbox.record(
        session,
        [
            outbox.Result(n, 1, worker.worker_id, SERVICE, classify(200, b"MSG_OK:1"), sent_ago=1.0)
            for n in range(1, 200)
        ],
    ),
    "held": lambda session, worker: outbox.held(session, worker.worker_id),
    "held and rescued": lambda session, worker: outbox.held(
        session, worker.worker_id, rescued=True
    ),
    "rescue": lambda session, _: session.fetch(outbox._RESCUE, datetime.now(UTC)),
    "retry_unknown": lambda session, _: outbox.retry_unknown(session, 60.0),
    "expire": lambda session, _: outbox.expire(session),
    "close_window": lambda session, _: quota.close_window(session, 5, 1, "day"),
    "slow": lambda session, _: services.slow(session, 5, 1),
}


async def fill(connection: Connection, worker: Peer, shape: str) -> None:
    """Fill the table, and let the planner know."""
    await connection.execute(FILL_SERVICES)
    await connection.execute(shape)
    await quota.open_windows(worker.session, list(range(1, 51)))
    for table in ("outbox", "service", "worker", "quota_usage", "pace"):
        await connection.execute(f"VACUUM ANALYZE {table}")


async def scans(database: str, worker: Peer, *names: str, planned_once: bool = False) -> list[str]:
    """Those of the statements that read the whole outbox."""
    found = []
    for name in names:
        async with Explaining(database, planned_once=planned_once) as session:
            await STATEMENTS[name](session, worker)
        assert len(session.plans) == 2
        found += [
            name
            for plan in session.plans
            for node in nodes(plan)
            if node.get("Relation Name") == "outbox" and node["Node Type"] == "Seq Scan"
        ]
    return found


@pytest.mark.parametrize("shape", [SETTLED, BACKLOG], ids=["settled", "backlog"])
async def test_no_statement_scans_the_outbox(
    database: str, connection: Connection, shape: str
) -> None:
    """No hot statement reads the whole table, planned for its values or planned once for any."""
    async with peer(database) as worker:
        await fill(connection, worker, shape)
        assert await scans(database, worker, *STATEMENTS) == []


async def test_a_plan_made_early_serves_later(database: str, connection: Connection) -> None:
    """Neither end of a message reads the whole of a small table, which may grow under the plan."""
    async with peer(database) as worker:
        await fill(connection, worker, SETTLED.replace(f"{ROWS}", "3000"))
        assert await scans(database, worker, "claim", "claim from the heads", "record") == []


async def test_a_plan_made_on_an_empty_table_serves_later(database: str) -> None:
    """A worker's sessions read no table whole, even one that nobody has ever analysed."""
    async with peer(database) as worker:
        assert await scans(database, worker, *STATEMENTS, planned_once=True) == []


async def test_a_statement_is_planned_once(database: str) -> None:
    """Not five times more for its values, as PostgreSQL would by itself."""
    async with (
        peer(database) as worker,
        Session(database, name="test", timeout=60, planned_once=True) as session,
    ):
        for _ in range(3):
            await outbox.claim(session, worker.worker_id, {SERVICE: 10})
        plans = await session.fetch(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1",
            outbox._CLAIM,
        )
    assert [tuple(row) for row in plans] == [(3, 0)]


async def test_cost_does_not_grow_with_the_backlog(database: str, connection: Connection) -> None:
    """To claim ten messages, or to look for work, takes a few pages however many wait."""
    async with peer(database) as worker:
        await fill(connection, worker, BACKLOG)
        pages: dict[str, int] = {}
        for name in ("waiting", "claim", "expire", "held"):
            async with Measuring(database) as session:
                await STATEMENTS[name](session, worker)
            pages[name] = session.pages

    table = await connection.fetchval("SELECT pg_relation_size('outbox') / 8192")
    assert table > 500
    assert pages["waiting"] < 250, pages
    assert pages["claim"] < 500, pages
    assert pages["expire"] < 10, pages
    assert pages["held"] < 250, pages
