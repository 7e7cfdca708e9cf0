"""Growth: the same work beside a million rows, under an old snapshot, among many services."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from bench.contenders.task import FIRST_NUMBER, SERVICE, USER, Task
from bench.database import Connection, Server
from bench.provider import Provider
from bench.race import Contender, rate, until_count
from bench.report import Finding, Target, progress, spread
from bench.size import Size
from dispatcher.db import outbox, quota, workers
from dispatcher.db.pool import Session
from dispatcher.domain import outcomes

CLAIM: Final = 100
"""Messages claimed and recorded by one statement."""

CLAIMS: Final = 30
"""Statements of each kind that are timed."""

URGENT: Final = 5
"""Messages of high priority sent past the backlog."""

_SERVICES = "INSERT INTO service (service_id, user_id) SELECT $1::bigint + s, $2::bigint FROM generate_series(0, $3::integer) s"

_FILL = """
INSERT INTO outbox (service_id, msisdn, text, status, worker_id, claimed_at)
SELECT $1::bigint + n % $3::bigint, ($2::bigint + n)::text, 'Your invoice ' || n || ' is ready', $5, 1, now()
FROM generate_series(1, $4::integer) n
"""


@dataclass(slots=True)
class Found:
    """What was measured in one situation, a value a round."""

    label: str
    claim_ms: list[float] = field(default_factory=list)
    record_ms: list[float] = field(default_factory=list)
    waiting_ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Statements:
    """The worker's own statements, run without the requests between them."""

    def __init__(self, session: Session, services: Sequence[int]) -> None:
        self._session = session
        self._services = services
        self._worker = 0

    @classmethod
    @asynccontextmanager
    async def ready(cls, dsn: str, services: Sequence[int]) -> AsyncIterator[Statements]:
        """Enter a worker that will claim of these services."""
        async with Session(dsn, name="bench", timeout=60) as session:
            made = cls(session, services)
            made._worker = await workers.enter(
                session, "default", host="bench", pid=0, version="0", lease=3600
            )
            await quota.open_windows(session, list(services))
            yield made
            await workers.leave(session, made._worker)

    async def turn(self, messages: int = CLAIM) -> tuple[int, float, float]:
        """Claim and record once: how many, and the milliseconds of each statement."""
        each = max(1, messages // len(self._services))
        began = time.perf_counter()
        claim = await outbox.claim(
            self._session, self._worker, dict.fromkeys(self._services, each)
        )
        claimed = time.perf_counter()
        results = [
            outbox.Result(
                row["id"],
                row["claim_no"],
                self._worker,
                row["service_id"],
                outcomes.classify(200, b"MSG_OK:%d" % row["id"]),
                sent_ago=0.001,
                seconds=0.001,
            )
            for row in claim.sending
        ]
        sent = time.perf_counter()
        await outbox.record(self._session, results)
        recorded = time.perf_counter()
        return len(results), (claimed - began) * 1000, (recorded - sent) * 1000

    async def waiting(self) -> float:
        """Milliseconds to learn which services have work."""
        began = time.perf_counter()
        await outbox.waiting(self._session, "default")
        return (time.perf_counter() - began) * 1000


async def fill(
    connection: Connection, count: int, *, services: int = 1, status: str = "pending"
) -> None:
    """Add messages, shared by the first services."""
    await connection.execute(_FILL, SERVICE, FIRST_NUMBER, services, count, status)
    await connection.execute("VACUUM ANALYZE outbox")


@asynccontextmanager
async def _situation(
    server: Server, prepare: Callable[[Connection], Awaitable[None]], *, services: int = 1
) -> AsyncIterator[str]:
    async with server.database(migrated=True) as database:
        async with server.connection(database) as connection:
            await connection.execute(_SERVICES, SERVICE, USER, services - 1)
            await prepare(connection)
        yield database


async def _observe(server: Server, database: str, found: Found, count: int, busy: int) -> None:
    """Time the statements, then let a worker send."""
    services = range(SERVICE, SERVICE + busy)
    async with Statements.ready(server.dsn(database), services) as statements:
        await statements.turn()
        turns = [await statements.turn() for _ in range(CLAIMS)]
        found.claim_ms.append(median(claim for _, claim, _ in turns))
        found.record_ms.append(median(record for _, _, record in turns))
        found.waiting_ms.append(median([await statements.waiting() for _ in range(5)]))
    async with _sending(server, database) as (provider, _):
        await until_count(provider.notes, count)
        found.rates.append(rate(provider.notes, count // 20))


@asynccontextmanager
async def _sending(server: Server, database: str) -> AsyncIterator[tuple[Provider, Task]]:
    """A worker at work on what waits in a database."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-grow-")))
        provider = await stack.enter_async_context(Provider.running(folder))
        task = Task(server.dsn(database), provider.url, 0)
        process = await stack.enter_async_context(Contender("dispatcher").running(task, folder))
        yield provider, task
        process.check()
        await process.stop()


async def churn(server: Server, database: str, count: int, *, at_once: int = 2) -> None:
    """Claim and record so many messages, by the worker's own statements."""
    left = count

    async def run() -> None:
        nonlocal left
        async with Statements.ready(server.dsn(database), [SERVICE]) as statements:
            while left > 0:
                asked = min(CLAIM, left)
                left -= asked
                done, _, _ = await statements.turn(asked)
                if done < asked:
                    left += asked - done
                    await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(run())


async def measure(server: Server, size: Size) -> list[Finding]:
    """The situations in turn, and how fast an urgent message gets past a backlog."""
    few, spare = size.few, CLAIM * (CLAIMS + 1)
    count = few - CLAIM * (CLAIMS + 1)
    base = Found(f"{few:,} pending")
    many = Found(f"{size.pending:,} pending")
    beside = Found(f"{few:,} pending, {size.pending:,} finished beside")
    snapshot = Found(f"{few:,} pending, {size.pending // 10:,} sent under an old snapshot")
    ten = Found("10 services")
    thousand = Found("1,000 services, 10 with work")
    urgent: list[float] = []

    async def small(connection: Connection) -> None:
        await fill(connection, few)

    async def large(connection: Connection) -> None:
        await fill(connection, size.pending)

    async def finished(connection: Connection) -> None:
        await fill(connection, size.pending, status="accepted")
        await fill(connection, few)

    async def used(connection: Connection) -> None:
        await fill(connection, few + size.pending // 10)

    async def shared(connection: Connection) -> None:
        await fill(connection, few, services=10)

    async with (
        _situation(server, large) as full,
        _situation(server, finished) as old,
        _situation(server, used) as held,
        server.connection(held) as holder,
    ):
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT count(*) FROM service")
        progress("growth: messages sent under an old snapshot")
        await churn(server, held, size.pending // 10)
        for number in range(size.growth_rounds):
            told = f"growth, round {number + 1} of {size.growth_rounds}"
            for found, database in ((many, full), (beside, old), (snapshot, held)):
                progress(f"{told}: {found.label}")
                if number and database != full:
                    async with server.connection(database) as connection:
                        await fill(connection, few)
                await _observe(server, database, found, count, 1)
            for found, prepare, services, busy in (
                (base, small, 1, 1),
                (ten, shared, 10, 10),
                (thousand, shared, 1000, 10),
            ):
                progress(f"{told}: {found.label}")
                async with _situation(server, prepare, services=services) as database:
                    await _observe(server, database, found, count, busy)
        await holder.execute("ROLLBACK")
        progress("growth: urgent messages past a large backlog")
        urgent = await _urgent(server, full)
    pairs = (
        (many, base, 0.10),
        (beside, base, 0.10),
        (snapshot, base, 0.10),
        (thousand, ten, 0.20),
    )
    return [
        Finding(
            "growth",
            "Growth: the same work in other surroundings",
            ("", "messages/s", f"claim of {CLAIM}, ms", f"record of {CLAIM}, ms", "survey, ms"),
            [
                [
                    found.label,
                    spread(found.rates, "{:,.0f}".format),
                    spread(found.claim_ms, "{:.2f}".format),
                    spread(found.record_ms, "{:.2f}".format),
                    spread(found.waiting_ms, "{:.2f}".format),
                ]
                for found in (base, many, beside, snapshot, ten, thousand)
            ],
            [
                target
                for found, against, most in pairs
                for target in (
                    _slower("rate", found, against, most),
                    _slower("claim", found, against, most),
                )
            ]
            + [
                Target(
                    f"an urgent message past {size.pending:,}",
                    "< 1 s",
                    f"{max(urgent):,.0f} ms at most",
                    max(urgent) < 1000,
                )
            ],
            [
                f"Claim, record and survey are the worker's own statements, timed alone "
                f"({CLAIMS} of each, medians); {spare:,} messages go to them.",
                f"Urgent: {URGENT} messages of priority 9, from the commit to the arrival.",
            ],
            {
                "situations": {
                    found.label: {"rates": found.rates, "claim_ms": found.claim_ms}
                    for found in (base, many, beside, snapshot, ten, thousand)
                },
                "pairs": [[found.label, against.label] for found, against, _ in pairs],
                "urgent_ms": urgent,
            },
        )
    ]


def _slower(what: str, found: Found, against: Found, most: float) -> Target:
    if what == "rate":
        change = 1 - median(found.rates) / median(against.rates)
    else:
        change = median(found.claim_ms) / median(against.claim_ms) - 1
    return Target(
        f"{what} with {found.label}",
        f"at most {most:.0%} slower",
        f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}",
        change <= most,
    )


async def _urgent(server: Server, database: str) -> list[float]:
    """Milliseconds from the commit of an urgent message to its request."""
    waits = []
    async with (
        _sending(server, database) as (provider, _),
        server.connection(database) as connection,
    ):
        await until_count(provider.notes, 1000)
        for index in range(URGENT):
            number = FIRST_NUMBER - 1 - index
            await connection.execute(
                "INSERT INTO outbox (service_id, msisdn, text, priority) VALUES ($1, $2, '!', 9)",
                SERVICE,
                str(number),
            )
            committed = time.monotonic_ns()
            seen = 0
            while True:
                arrivals = provider.notes.since(seen)
                seen += len(arrivals)
                at = next((a.at for a in arrivals if a.number == number), None)
                if at is not None:
                    break
                await asyncio.sleep(0.02)
            waits.append((at - committed) / 1e6)
    return waits
