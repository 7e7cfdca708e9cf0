"""Capacity: what one PostgreSQL carries, with several workers on several services."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

from bench.cases.growth import SERVICES, Statements, fill
from bench.contenders.task import SERVICE, USER, Task
from bench.database import Server
from bench.provider import Provider
from bench.race import Contender, rate, until_count
from bench.report import Finding, Target, progress
from bench.size import Size


class Carried(NamedTuple):
    """What went through."""

    rate: float
    database_cpu: float
    """Seconds of PostgreSQL's CPU a message."""


async def measure(server: Server, size: Size) -> list[Finding]:
    """Whole workers with their requests, then their statements alone."""
    whole, alone = {}, {}
    for workers in size.workers:
        progress(f"capacity: {workers} workers on as many services")
        whole[workers] = await _workers(server, workers, size.messages * 2)
    for sessions in size.sessions:
        progress(f"capacity: the statements of {sessions} workers, without requests")
        alone[sessions] = await _statements(server, sessions, size.messages * 3)
    best = max(carried.rate for carried in alone.values())
    return [
        Finding(
            "capacity",
            "Capacity of one PostgreSQL, each worker on a service of its own",
            ("", "messages/s", "million a day", "PostgreSQL's CPU, ms a message"),
            [
                [
                    label,
                    f"{carried.rate:,.0f}",
                    f"{carried.rate * 86_400 / 1e6:,.0f}",
                    f"{carried.database_cpu * 1000:.3f}",
                ]
                for label, carried in [
                    *((f"{n} workers, provider and PostgreSQL", c) for n, c in whole.items()),
                    *((f"statements of {n} workers alone", c) for n, c in alone.items()),
                ]
            ],
            [
                Target(
                    "two workers on two services against one",
                    ">= 1",
                    f"{whole[2].rate / whole[1].rate:.2f} times",
                    whole[2].rate >= whole[1].rate,
                )
            ],
            [
                "Workers, the provider and PostgreSQL share the machine's cores.",
                "The statements alone, a hundred messages each: if the workers ran elsewhere.",
            ],
            {
                "workers": {str(n): carried.rate for n, carried in whole.items()},
                "statements": {str(n): carried.rate for n, carried in alone.items()},
                "best": best,
            },
        )
    ]


async def _workers(server: Server, workers: int, count: int) -> Carried:
    contender = Contender("dispatcher")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-cap-")))
        provider = await stack.enter_async_context(Provider.running(folder, room=count + 1000))
        database = await stack.enter_async_context(server.database(migrated=True))
        async with server.connection(database) as connection:
            await connection.execute(SERVICES, SERVICE, USER, workers - 1)
            await fill(connection, count, services=workers)
        task = Task(server.dsn(database), provider.url, count)
        processes = []
        for number in range(workers):
            own = folder / str(number)
            own.mkdir()
            processes.append(await stack.enter_async_context(contender.running(task, own)))
        await until_count(provider.notes, count // 5, *processes)
        cpu, first = server.cpu(), len(provider.notes)
        await until_count(provider.notes, count - count // 10, *processes)
        used, messages = server.cpu() - cpu, len(provider.notes) - first
        found = Carried(rate(provider.notes, count // 5, count - count // 10), used / messages)
        for process in processes:
            await process.stop()
        return found


async def _statements(server: Server, sessions: int, count: int) -> Carried:
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(server.database(migrated=True))
        async with server.connection(database) as connection:
            await connection.execute(SERVICES, SERVICE, USER, sessions - 1)
            await fill(connection, count, services=sessions)
        # Open until the end: what a process that has ended took of the CPU may be told late.
        ready = [
            await stack.enter_async_context(
                Statements.ready(server.dsn(database), [SERVICE + number])
            )
            for number in range(sessions)
        ]

        async def run(statements: Statements) -> int:
            total = 0
            while (done := (await statements.turn())[0]) > 0:
                total += done
            return total

        cpu, began = server.cpu(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(statements)) for statements in ready]
        seconds = time.perf_counter() - began
        messages = sum(task.result() for task in tasks)
        return Carried(messages / seconds, (server.cpu() - cpu) / messages)
