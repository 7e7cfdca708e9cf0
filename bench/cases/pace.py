"""Pace: a minimum delay that the provider enforces on arrival, by one worker and by four."""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from bench.contenders.task import SERVICE, Task
from bench.database import Server
from bench.provider import Provider, Settings
from bench.race import Contender, until_count
from bench.report import Finding, Target, progress
from bench.size import Size

DELAY: Final = 0.05
WORKERS: Final = (1, 4)


async def measure(server: Server, size: Size) -> list[Finding]:
    """How much of the allowed rate is used, and how much is refused."""
    found = {}
    for workers in WORKERS:
        progress(f"pace: min_delay 50 ms, {workers} workers")
        found[workers] = await _pace(server, workers, size.pace_messages)
    return [
        Finding(
            "pace",
            "Pace: min_delay 50 ms, enforced on arrival, answers after 50 to 150 ms",
            ("workers", "rate used", "refused"),
            [
                [str(workers), f"{used:.1%}", f"{refused:.2%}"]
                for workers, (used, refused) in found.items()
            ],
            [
                target
                for workers, (used, refused) in found.items()
                for target in (
                    Target(f"rate used, {workers} workers", ">= 95 %", f"{used:.1%}", used >= 0.95),
                    Target(
                        f"refused, {workers} workers",
                        "< 0.5 %",
                        f"{refused:.2%}",
                        refused < 0.005,
                    ),
                )
            ],
            [f"{size.pace_messages} messages each."],
            {str(w): {"used": u, "refused": r} for w, (u, r) in found.items()},
        )
    ]


async def _pace(server: Server, workers: int, count: int) -> tuple[float, float]:
    contender = Contender("dispatcher")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-pace-")))
        provider = await stack.enter_async_context(
            Provider.running(
                folder, Settings(min_delay=DELAY, answer_after=(0.05, 0.15)), room=3 * count + 100
            )
        )
        database = await stack.enter_async_context(server.database(migrated=True))
        task = Task(server.dsn(database), provider.url, count)
        await contender.prepare(task, folder)
        async with server.connection(database) as connection:
            await connection.execute(
                "UPDATE service SET min_delay = make_interval(secs => $2) WHERE service_id = $1",
                SERVICE,
                DELAY,
            )
        processes = []
        for number in range(workers):
            own = folder / str(number)
            own.mkdir()
            processes.append(await stack.enter_async_context(contender.running(task, own)))
        await until_count(provider.notes, count, *processes)
        arrivals = provider.notes.since(0)
        accepted = [arrival.at for arrival in arrivals if arrival.accepted]
        for process in processes:
            await process.stop()
    used = (len(accepted) - 1) * DELAY / (accepted[-1] - accepted[0]) * 1e9
    return used, 1 - len(accepted) / len(arrivals)
