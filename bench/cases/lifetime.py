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
"""How many times its fresh size a table or an index may have."""

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
        began = time.monotonic()
        for done in range(0, size.lived, STEP):
            progress(f"lifetime: {done:,} of {size.lived:,} messages claimed and recorded")
            await asyncio.gather(
                churn(server, database, STEP),
                _add(server, database),
            )
        seconds = time.monotonic() - began
        lived = await _sizes(connection)
        vacuums = await connection.fetchval(
            "SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'outbox'"
        )
        await connection.execute("VACUUM FULL outbox")
        fresh = await _sizes(connection)
    kept = {name: bytes_ for name, bytes_ in lived.items() if bytes_ > 100_000}
    worst = max(kept, key=lambda name: lived[name] / max(fresh[name], 8192 * 16))
    ratio = lived[worst] / max(fresh[worst], 8192 * 16)
    return [
        Finding(
            "lifetime",
            f"Lifetime: the outbox after {size.lived:,} messages, {BACKLOG:,} waiting at any time",
            ("", "MB", "MB built anew", "times"),
            [
                [
                    name,
                    f"{lived[name] / 1e6:.1f}",
                    f"{fresh[name] / 1e6:.1f}",
                    f"{lived[name] / max(fresh[name], 8192):.2f}",
                ]
                for name in lived
            ],
            [
                Target(
                    "the most bloated of those over 0.1 MB",
                    f"<= {BLOAT:g} times",
                    f"{worst}, {ratio:.2f} times",
                    ratio <= BLOAT,
                )
            ],
            [
                (
                    f"The worker's own statements, {size.lived / seconds:,.0f} messages a second "
                    f"by two sessions, inserts beside them; autovacuum came {vacuums} times."
                ),
            ],
            {"lived": lived, "fresh": fresh, "seconds": seconds, "rate": size.lived / seconds},
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
