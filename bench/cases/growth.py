"""Growth: the same work beside a million rows, under an old snapshot, among many services."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from bench.contenders.task import FIRST_NUMBER, SERVICE, USER, Task
from bench.database import Connection, Server
from bench.processes import Process
from bench.provider import Provider
from bench.race import Contender, rate, until_count
from bench.report import Finding, Target, percentile, progress, spread
from bench.size import Size
from dispatcher.db import outbox, quota, workers
from dispatcher.db.pool import Session
from dispatcher.domain import outcomes

CLAIM: Final = 100
"""Messages claimed and recorded by one statement."""

BURSTS: Final = 4
"""Times that each situation has its turn, after one more for the plans and the pages."""

CLAIMS: Final = 15
"""Statements of each kind in one turn, after one survey: fewer than a worker that is busy runs.
With a small backlog only as many as it lasts for."""

SURVEY: Final = 1.0
"""Seconds from one survey to the next, as with the worker's default."""

URGENT: Final = 5
"""Messages of high priority sent past the backlog."""

SERVICES = """
INSERT INTO service (service_id, user_id)
SELECT $1::bigint + s, $2::bigint
FROM generate_series(0, $3::integer) s
"""

_FILL = """
INSERT INTO outbox (service_id, msisdn, text, status, worker_id, claimed_at)
SELECT
    $1::bigint + n % $3::bigint, ($2::bigint + n)::text, 'Your invoice ' || n || ' is ready',
    $5, 1, now()
FROM generate_series(1, $4::integer) n
"""


@dataclass(slots=True)
class Situation:
    """A database, and what was measured in it."""

    label: str
    pending: int
    services: int = 1
    busy: int = 1
    """Services with work."""
    finished: int = 0
    sent: int = 0
    """Messages sent since another session began to hold a snapshot."""
    database: str = ""
    claim_ms: list[float] = field(default_factory=list)
    record_ms: list[float] = field(default_factory=list)
    survey_ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Statements:
    """The worker's own statements, run without the requests between them."""

    def __init__(self, session: Session, services: Sequence[int]) -> None:
        self._session = session
        self._services = services
        self._worker = 0
        self._heads: dict[int, dict[int, outbox.Head]] = {}
        self._surveyed_at = 0.0

    @classmethod
    @asynccontextmanager
    async def ready(cls, dsn: str, services: Sequence[int]) -> AsyncIterator[Statements]:
        """Enter a worker that will claim of these services."""
        async with Session(dsn, name="bench", timeout=60, planned_once=True) as session:
            made = cls(session, services)
            made._worker = await workers.enter(
                session, "default", host="bench", pid=0, version="0", lease=3600
            )
            await quota.open_windows(session, list(services))
            yield made
            await workers.leave(session, made._worker)

    async def turn(self, messages: int = CLAIM) -> tuple[int, float, float]:
        """Claim and record once: how many, and the milliseconds of each statement."""
        if time.perf_counter() - self._surveyed_at > SURVEY:
            await self.survey()
        each = max(1, messages // len(self._services))
        began = time.perf_counter()
        claim = await outbox.claim(
            self._session, self._worker, dict.fromkeys(self._services, each), heads=self._heads
        )
        claimed = time.perf_counter()
        if len(claim.sending) == each * len(self._services):
            for row in claim.services:
                self._heads.setdefault(row["service_id"], {}).update(outbox.heads_in(row))
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

    async def survey(self) -> float:
        """Milliseconds to learn which services have work."""
        began = time.perf_counter()
        found = await outbox.waiting(self._session, "default")
        ended = self._surveyed_at = time.perf_counter()
        self._heads = {waiting.service_id: waiting.heads for waiting in found}
        return (ended - began) * 1000


async def fill(
    connection: Connection, count: int, *, services: int = 1, status: str = "pending"
) -> None:
    """Add messages, shared by the first services."""
    await connection.execute(_FILL, SERVICE, FIRST_NUMBER, services, count, status)
    await connection.execute("VACUUM ANALYZE outbox")


async def _make(server: Server, stack: AsyncExitStack, situation: Situation) -> None:
    """Make its database, with what is special about it."""
    database = await stack.enter_async_context(server.database(migrated=True))
    situation.database = database
    async with server.connection(database) as connection:
        await connection.execute(SERVICES, SERVICE, USER, situation.services - 1)
        if situation.finished:
            await fill(connection, situation.finished, status="accepted")
        if situation.sent:
            await fill(connection, situation.sent)
            holder = await stack.enter_async_context(server.connection(database))
            await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await holder.execute("SELECT count(*) FROM service")
            await churn(server, database, situation.sent)
        await _top_up(connection, situation)


async def _top_up(connection: Connection, situation: Situation) -> None:
    """Have as many messages wait as there should be."""
    there = await connection.fetchval("SELECT count(*) FROM outbox WHERE status = 'pending'")
    if there < situation.pending:
        await fill(connection, situation.pending - there, services=situation.busy)


async def _time_statements(server: Server, situations: Sequence[Situation]) -> None:
    """Time the worker's statements in all situations, in turn, each alone."""
    async with AsyncExitStack() as stack:
        statements = [
            await stack.enter_async_context(
                Statements.ready(
                    server.dsn(situation.database), range(SERVICE, SERVICE + situation.busy)
                )
            )
            for situation in situations
        ]
        claims = min(CLAIMS, min(s.pending for s in situations) // (CLAIM * (1 + BURSTS)))
        for number in range(1 + BURSTS):
            for situation, ours in zip(situations, statements, strict=True):
                survey = await ours.survey()
                turns = [await ours.turn() for _ in range(claims)]
                if number > 0:
                    situation.survey_ms.append(survey)
                    situation.claim_ms += [claim for _, claim, _ in turns]
                    situation.record_ms += [record for _, _, record in turns]


@asynccontextmanager
async def _sending(server: Server, database: str) -> AsyncIterator[tuple[Provider, Process]]:
    """A worker at work on what waits in a database."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-grow-")))
        provider = await stack.enter_async_context(Provider.running(folder))
        task = Task(server.dsn(database), provider.url, 0)
        process = await stack.enter_async_context(Contender("dispatcher").running(task, folder))
        yield provider, process
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
    few, lots = size.few, size.pending
    sent = lots // 10
    base = Situation(f"{few:,} pending", few)
    many = Situation(f"{lots:,} pending", lots)
    beside = Situation(f"{few:,} pending, {lots:,} finished beside", few, finished=lots)
    snapshot = Situation(f"{few:,} pending, {sent:,} sent under an old snapshot", few, sent=sent)
    ten = Situation("10 services", few, services=10, busy=10)
    thousand = Situation("1,000 services, 10 with work", few, services=1000, busy=10)
    situations = (base, many, beside, snapshot, ten, thousand)
    async with AsyncExitStack() as stack:
        for situation in situations:
            progress(f"growth: making {situation.label}")
            await _make(server, stack, situation)
        progress("growth: the worker's statements, each alone")
        await _time_statements(server, situations)
        for number in range(size.growth_rounds):
            for situation in situations if number % 2 == 0 else situations[::-1]:
                progress(f"growth, round {number + 1} of {size.growth_rounds}: {situation.label}")
                async with server.connection(situation.database) as connection:
                    await _top_up(connection, situation)
                async with _sending(server, situation.database) as (provider, process):
                    await until_count(provider.notes, few - few // 20, process)
                    situation.rates.append(rate(provider.notes, few // 20))
        progress("growth: urgent messages past a large backlog")
        urgent = await _urgent(server, many.database)
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
                    situation.label,
                    spread(situation.rates, "{:,.0f}".format) if situation.rates else "-",
                    *(
                        _quartiles(values)
                        for values in (
                            situation.claim_ms,
                            situation.record_ms,
                            situation.survey_ms,
                        )
                    ),
                ]
                for situation in situations
            ],
            [
                target
                for found, against, most in pairs
                for target in (
                    *([_slower("rate", found, against, most)] if found.rates else ()),
                    _slower("claim", found, against, most),
                )
            ]
            + [
                Target(
                    f"an urgent message past {lots:,}",
                    "< 1 s",
                    f"{max(urgent):,.0f} ms at most",
                    max(urgent) < 1000,
                )
            ],
            [
                (
                    "Claim, record and survey: the worker's own statements, each alone, "
                    f"a survey and up to {CLAIMS} claims and records, {BURSTS} times in all "
                    "situations in turn; medians and quartiles."
                ),
                f"Urgent: {URGENT} messages of priority 9, from the commit to the arrival.",
            ],
            {
                "situations": {
                    situation.label: {
                        "rates": situation.rates,
                        "claim_ms": situation.claim_ms,
                        "record_ms": situation.record_ms,
                        "survey_ms": situation.survey_ms,
                    }
                    for situation in situations
                },
                "pairs": [[found.label, against.label] for found, against, _ in pairs],
                "urgent_ms": urgent,
            },
        )
    ]


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = (percentile(values, share) for share in (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def _slower(what: str, found: Situation, against: Situation, most: float) -> Target:
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
