"""Reports: how much 2,000 delivery reports a second slow the sending, in the same process."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from bench.contenders.task import SERVICE, Task
from bench.database import Server
from bench.processes import started
from bench.provider import Provider, Settings
from bench.race import Contender, rate, until_count
from bench.report import Finding, Target, progress, spread
from bench.size import Size

RATE: Final = 2100
"""Reports a second that are delivered."""

TOKEN: Final = "benchmark"  # noqa: S105 - of a server that lives for a few seconds

# Messages that were accepted before, whose reports now come.
_SENT = """
INSERT INTO outbox (
    service_id, msisdn, text, status, provider_id, attempts, accepted_at, status_at)
SELECT
    $1, '359880000000', 'sent before', 'accepted', 'r' || number, 1,
    clock_timestamp(), clock_timestamp()
FROM generate_series(1, $2::integer) AS number
"""

_APPLIED = "SELECT count(*) FROM outbox WHERE status = 'delivered'"


class _Run(NamedTuple):
    rate: float
    """Messages a second."""
    cpu: float
    """The worker's, as a share of a core."""
    reports: float
    """Reports a second that were answered with OK."""


async def measure(server: Server, size: Size) -> list[Finding]:
    """The sending alone, and beside the reports, in turn."""
    alone, beside = [], []
    for number in range(size.rounds):
        progress(f"reports, round {number + 1} of {size.rounds}: none")
        alone.append(await _send(server, size.reports_messages, reports=False))
        progress(f"reports, round {number + 1} of {size.rounds}: {RATE} a second")
        beside.append(await _send(server, size.reports_messages, reports=True))
    ratios = [b.rate / a.rate for a, b in zip(alone, beside, strict=True)]
    taken = median(run.reports for run in beside)
    return [
        Finding(
            "reports",
            "Delivery reports beside the sending: answers after 50 to 150 ms, 100 in flight",
            ("", "messages/s", "reports/s", "worker's CPU"),
            [
                [
                    label,
                    spread([run.rate for run in runs], "{:,.0f}".format),
                    spread([run.reports for run in runs], "{:,.0f}".format),
                    spread([run.cpu for run in runs], "{:.0%}".format),
                ]
                for label, runs in (("no reports", alone), ("reports", beside))
            ],
            [
                Target(
                    "sending beside reports",
                    "at most 10% slower",
                    f"{1 - median(ratios):.1%} slower",
                    median(ratios) >= 0.9,
                ),
                Target("reports a second", ">= 2,000", f"{taken:,.0f}", taken >= 2000),
            ],
            ["Each report is for a message sent before; it is durable before its OK, and applied."],
            {
                "alone": [run._asdict() for run in alone],
                "beside": [run._asdict() for run in beside],
            },
        )
    ]


async def _send(server: Server, count: int, *, reports: bool) -> _Run:
    contender = Contender("dispatcher")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-dlr-")))
        provider = await stack.enter_async_context(
            Provider.running(folder, Settings(answer_after=(0.05, 0.15)), room=count + 1000)
        )
        database = await stack.enter_async_context(server.database(migrated=True))
        task = Task(server.dsn(database), provider.url, count)
        await contender.prepare(task, folder)
        async with server.connection(database) as connection:
            # More than can come while a thousand messages or so a second are sent.
            await connection.execute(_SENT, SERVICE, RATE * (count // 500 + 10))
            await connection.execute("VACUUM ANALYZE outbox")
        process = await stack.enter_async_context(
            contender.running(task, folder, {"dlr_token": TOKEN})
        )
        reporter = None
        if reports:
            await process.printed("http.listening")
            listening = next(
                told
                for told in map(json.loads, process.log.read_text().splitlines())
                if told["event"] == "http.listening"
            )
            address = f"http://127.0.0.1:{listening['port']}/dlr/{TOKEN}"
            reporter = await stack.enter_async_context(
                started(
                    (sys.executable, "-m", "bench.reporter", address, str(RATE)),
                    folder / "reporter.log",
                )
            )
            await reporter.first_line()
        # What is sent before the reports come does not count.
        first = max(len(provider.notes), count // 10)
        await until_count(provider.notes, first, process)
        cpu, began = process.cpu(), provider.notes.since(first - 1)[0].at
        last = count - count // 10
        await until_count(provider.notes, last, process)
        share = (process.cpu() - cpu) / (provider.notes.since(last - 1)[0].at - began) * 1e9
        sent = rate(provider.notes, first, last)
        taken = 0.0
        if reporter is not None:
            await reporter.stop()
            ok, refused, seconds = reporter.told().splitlines()[-1].split()
            if int(refused):
                raise RuntimeError(f"{refused} reports were refused")
            taken = int(ok) / float(seconds)
            async with server.connection(database) as connection:
                if not await connection.fetchval(_APPLIED):
                    raise RuntimeError("no report was applied")
        await process.stop()
    return _Run(sent, share, taken)
