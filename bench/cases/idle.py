"""Idle: what a worker costs while there is nothing to do."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from bench.contenders.task import Task
from bench.database import Server
from bench.provider import Provider
from bench.race import Contender
from bench.report import Finding, Target, progress
from bench.size import Size

CONTENDERS: Final = ("dispatcher", "pgqueuer", "procrastinate")

SETTLES: Final = 4.0
"""Seconds that pass first."""


async def measure(server: Server, size: Size) -> list[Finding]:
    """All at once: they cost next to nothing, and so cannot disturb each other."""
    progress("idle: all contenders at once")
    async with AsyncExitStack() as stack:
        processes, databases = {}, {}
        for name in CONTENDERS:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-idle-"))
            )
            provider = await stack.enter_async_context(Provider.running(folder, room=1))
            contender = Contender(name)
            databases[name] = await stack.enter_async_context(
                server.database(migrated=contender.is_dispatcher)
            )
            task = Task(server.dsn(databases[name]), provider.url, 0)
            await contender.prepare(task, folder)
            processes[name] = await stack.enter_async_context(contender.running(task, folder))
        await asyncio.sleep(SETTLES)
        began = time.monotonic()
        cpu = {name: process.cpu() for name, process in processes.items()}
        before = {name: await server.counters(databases[name]) for name in CONTENDERS}
        await asyncio.sleep(size.idle_seconds)
        seconds = time.monotonic() - began
        shares = {
            name: (process.cpu() - cpu[name]) / seconds for name, process in processes.items()
        }
        rates = {
            name: (
                (await server.counters(databases[name])).transactions - before[name].transactions
            )
            / seconds
            for name in CONTENDERS
        }
        for process in processes.values():
            await process.stop()
    share, rate = shares["dispatcher"], rates["dispatcher"]
    return [
        Finding(
            "idle",
            "Idle",
            ("", "share of a core", "transactions/s"),
            [
                [Contender(name).label, f"{shares[name]:.2%}", f"{rates[name]:.2f}"]
                for name in CONTENDERS
            ],
            [
                Target("share of a core", "< 1 %", f"{share:.2%}", share < 0.01),
                Target("transactions a second", "<= 4", f"{rate:.2f}", rate <= 4),
            ],
            [f"Over {size.idle_seconds:g} seconds, nothing to send."],
            {"labels": {n: Contender(n).label for n in CONTENDERS}, "cpu": shares, "tx": rates},
        )
    ]
