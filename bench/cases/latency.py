"""Latency: from the insert's commit to the request's arrival, at 20 messages a second."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Final

from bench.contenders.task import FIRST_NUMBER, Task
from bench.database import Server
from bench.provider import Provider
from bench.race import Contender, until_count
from bench.report import Finding, Target, percentile, progress
from bench.size import Size

CONTENDERS: Final = ("dispatcher", "pgqueuer", "procrastinate")
EVERY: Final = 0.05
WARM: Final = 10
"""Messages sent before the first that counts."""


async def measure(server: Server, size: Size) -> list[Finding]:
    """The distribution for each contender that is woken by an insert."""
    waits: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    whole: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(size.latency_rounds):
        for name in CONTENDERS:
            contender = Contender(name)
            progress(f"latency, round {number + 1} of {size.latency_rounds}: {contender.label}")
            since_commit, since_insert = await _trickle(
                server, contender, size.latency_messages // size.latency_rounds
            )
            waits[name] += since_commit
            whole[name] += since_insert
    half = percentile(waits["dispatcher"], 0.5)
    most = percentile(waits["dispatcher"], 0.99)
    return [
        Finding(
            "latency",
            "Latency at 20 messages a second, ms from the insert's commit to the provider",
            ("", "p50", "p90", "p99", "most", "p50 from the INSERT"),
            [
                [
                    Contender(name).label,
                    *(f"{percentile(found, share):.2f}" for share in (0.5, 0.9, 0.99, 1.0)),
                    f"{median(whole[name]):.2f}",
                ]
                for name, found in waits.items()
            ],
            [
                Target("p50", "< 3 ms", f"{half:.2f} ms", half < 3),
                Target("p99", "< 15 ms", f"{most:.2f} ms", most < 15),
            ],
            [
                (
                    "The commit is taken for done when the client has its answer; "
                    f"{len(waits['dispatcher'])} messages each, at random moments 50 ms apart on "
                    "average."
                ),
            ],
            {"labels": {name: Contender(name).label for name in CONTENDERS}, "ms": waits},
        )
    ]


async def _trickle(
    server: Server, contender: Contender, count: int
) -> tuple[list[float], list[float]]:
    """Milliseconds from each commit, and from each insert's beginning, to the arrival."""
    insert = import_module(f"bench.contenders.{contender.name}").insert
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-lat-")))
        provider = await stack.enter_async_context(Provider.running(folder, room=count + WARM))
        database = await stack.enter_async_context(
            server.database(migrated=contender.is_dispatcher)
        )
        task = Task(server.dsn(database), provider.url, 0)
        await contender.prepare(task, folder)
        connection = await stack.enter_async_context(server.connection(database))
        process = await stack.enter_async_context(contender.running(task, folder))
        inserted: dict[int, tuple[int, int]] = {}
        for index in range(WARM + count):
            began = time.monotonic_ns()
            await insert(connection, index)
            inserted[FIRST_NUMBER + index] = (began, time.monotonic_ns())
            if index == 0:
                await until_count(provider.notes, 1, process)
            await asyncio.sleep(EVERY * random.uniform(0.5, 1.5))
        await until_count(provider.notes, WARM + count, process)
        arrivals = {arrival.number: arrival.at for arrival in provider.notes.since(0)}
        counted = list(inserted)[WARM:]
        await process.stop()
        return (
            [(arrivals[number] - inserted[number][1]) / 1e6 for number in counted],
            [(arrivals[number] - inserted[number][0]) / 1e6 for number in counted],
        )
