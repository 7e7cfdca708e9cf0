"""Lifetime: what tables and indexes grow to under steady work, against freshly built ones."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from bench.cases.growth import churn, fill
from bench.contenders.task import SERVICE, USER
from bench.database import Connection, Server
from bench.report import Finding, Target, progress
from bench.size import Size

BACKLOG: Final = 10_000
"""Messages that wait at any time."""

STEP: Final = 10_000
"""Messages added at once."""

BLOAT: Final = 2.0
"""How many times their fresh size table and indexes may have, all together."""

LIVE: Final = ("outbox_due", "outbox_held")
"""The indexes of what waits and of what is being sent: all their entries are soon dead."""

GROWTH: Final = 1.25
"""How much larger they may be in the second half than in the first."""

NAPTIME: Final = "15s"
"""Autovacuum's, so that minutes show what takes hours at usual rates."""

_SIZES = """
SELECT c.relname AS name, pg_relation_size(c.oid) AS bytes
FROM pg_class c
WHERE c.oid = 'outbox'::regclass
    OR c.oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'outbox'::regclass)
ORDER BY c.relname
"""


async def measure(server: Server, size: Size) -> list[Finding]:
    """Sizes after many messages, then after the table was built anew."""
    progress(f"lifetime: {size.lived:,} messages claimed and recorded")
    async with (
        server.database(migrated=True) as database,
        server.connection(database) as connection,
    ):
        await connection.execute(
            "INSERT INTO service (service_id, user_id) VALUES ($1, $2)", SERVICE, USER
        )
        await fill(connection, BACKLOG)
        await server.execute(
            f"ALTER SYSTEM SET autovacuum_naptime = '{NAPTIME}'", "SELECT pg_reload_conf()"
        )
        began = time.monotonic()
        sizes = []
        for done in range(0, size.lived, STEP):
            progress(f"lifetime: {done:,} of {size.lived:,} messages claimed and recorded")
            await asyncio.gather(churn(server, database, STEP), _add(server, database))
            sizes.append(await _sizes(connection))
        seconds = time.monotonic() - began
        vacuums = await connection.fetchval(
            "SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'outbox'"
        )
        await connection.execute("VACUUM FULL outbox")
        fresh = await _sizes(connection)
        await server.execute("ALTER SYSTEM RESET autovacuum_naptime", "SELECT pg_reload_conf()")
    lived = sizes[-1]
    ratio = sum(lived.values()) / sum(fresh.values())
    live = [sum(found[name] for name in LIVE) for found in sizes]
    middle = max(1, len(live) // 2)
    growth = max(live[middle:]) / max(live[:middle]) if len(live) > 1 else 1.0
    return [
        Finding(
            "lifetime",
            f"Lifetime: the outbox after {size.lived:,} messages, {BACKLOG:,} waiting at any time",
            ("", "MB", "most MB", "MB built anew"),
            [
                [
                    name,
                    f"{lived[name] / 1e6:.1f}",
                    f"{max(found[name] for found in sizes) / 1e6:.1f}",
                    f"{fresh[name] / 1e6:.1f}",
                ]
                for name in lived
            ],
            [
                Target(
                    "table and indexes against freshly built ones",
                    f"<= {BLOAT:g} times",
                    f"{ratio:.2f} times",
                    ratio <= BLOAT,
                ),
                Target(
                    "indexes of what waits and is being sent, second half against first",
                    f"<= {GROWTH:g} times",
                    f"{growth:.2f} times",
                    growth <= GROWTH,
                ),
            ],
            [
                (
                    "The worker's own statements by two sessions, inserts beside them, "
                    f"{size.lived / seconds:,.0f} messages a second."
                ),
                f"Autovacuum looked every {NAPTIME} and came {vacuums} times.",
            ],
            {"step": STEP, "sizes": sizes, "fresh": fresh, "seconds": seconds},
        )
    ]


async def _add(server: Server, database: str) -> None:
    async with server.connection(database) as connection:
        for _ in range(STEP // 1000):
            await connection.execute(
                "INSERT INTO outbox (service_id, msisdn, text)"
                " SELECT $1, '35988' || n, 'Your invoice is ready'"
                " FROM generate_series(1000000, 1000999) n",
                SERVICE,
            )


async def _sizes(connection: Connection) -> dict[str, int]:
    return {row["name"]: row["bytes"] for row in await connection.fetch(_SIZES)}
