"""One contender on its way through its messages, watched from outside."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

from bench.contenders.task import Task
from bench.database import Server
from bench.processes import LOOK, PATIENCE, Process, done, started
from bench.provider import Notes, Provider, Settings

PYTHON: Final = sys.executable


class Contender:
    """One of the modules in `contenders`."""

    def __init__(self, name: str) -> None:
        module = import_module(f"bench.contenders.{name}")
        self.name = name
        self.label: str = module.LABEL
        self.settings: str = module.SETTINGS
        self.share: float = module.SHARE
        self.recorded: str | None = module.RECORDED

    @property
    def is_dispatcher(self) -> bool:
        """Whether it is ours."""
        return self.name == "dispatcher"

    async def prepare(self, task: Task, folder: Path) -> None:
        """Leave its messages waiting."""
        command = (PYTHON, "-m", "bench.contenders", self.name, "prepare")
        await done(command, folder / "prepare.log", task.environment)

    @asynccontextmanager
    async def running(
        self, task: Task, folder: Path, settings: Mapping[str, object] | None = None
    ) -> AsyncIterator[Process]:
        """Run it; `settings` are the dispatcher's own, in small letters."""
        command: tuple[str, ...] = (PYTHON, "-m", "bench.contenders", self.name, "run")
        environment = task.environment
        if self.is_dispatcher:
            command = (PYTHON, "-m", "dispatcher", "run")
            chosen = {
                "data_dir": folder,
                "provider_url": task.url,
                "http_port": 0,
                "log_format": "json",
                **(settings or {}),
            }
            environment = {
                "DATABASE_URL": task.dsn,
                **{f"DISPATCHER_{key.upper()}": str(value) for key, value in chosen.items()},
            }
        async with started(command, folder / f"{self.name}.log", environment) as process:
            yield process


class Sample(NamedTuple):
    """How things stood at one moment."""

    at: float
    arrived: int
    worker: float
    """Seconds of CPU of the contender so far; likewise the others."""
    provider: float
    database: float


class Result(NamedTuple):
    """What a run took, each per message where not said otherwise."""

    rate: float
    """Messages a second, from the first request's arrival to the last one's."""
    worker_cpu: float
    """Seconds; of the middle nine tenths of the run, as the two below."""
    provider_cpu: float
    database_cpu: float
    transactions: float | None
    wal_bytes: float | None
    memory: int
    """Bytes resident, the most that was seen."""


async def until_count(notes: Notes, count: int, *watched: Process) -> None:
    """Wait until so many requests have come; raises TimeoutError, or if a process ended."""
    last, seen_at = 0, time.monotonic()
    while (now := len(notes)) < count:
        for process in watched:
            process.check()
        if now > last:
            last, seen_at = now, time.monotonic()
        elif time.monotonic() - seen_at > PATIENCE:
            raise TimeoutError(f"only {now} of {count} requests came")
        await asyncio.sleep(LOOK)


def rate(notes: Notes, first: int = 0, last: int | None = None) -> float:
    """Requests a second from the given one on, to another one or to the end."""
    arrivals = notes.since(first)[: None if last is None else last - first]
    return (len(arrivals) - 1) / (arrivals[-1].at - arrivals[0].at) * 1e9


async def race(server: Server, contender: Contender, count: int) -> Result:
    """Let a contender send so many messages that wait already."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatcher-race-")))
        provider = await stack.enter_async_context(
            Provider.running(folder, Settings(), room=count + 1000)
        )
        database = None
        if contender.recorded is not None:
            database = await stack.enter_async_context(
                server.database(migrated=contender.is_dispatcher)
            )
        task = Task(server.dsn(database or "postgres"), provider.url, count)
        await contender.prepare(task, folder)
        before = None if database is None else await server.counters(database)
        memory = 0
        process = await stack.enter_async_context(contender.running(task, folder))

        def sample() -> Sample:
            nonlocal memory
            memory = max(memory, process.memory())
            return Sample(
                time.monotonic(),
                len(provider.notes),
                process.cpu(),
                provider.process.cpu(),
                server.cpu(),
            )

        await until_count(provider.notes, count // 20, process, provider.process)
        first = sample()
        await until_count(provider.notes, count - count // 20, process, provider.process)
        last = sample()
        await until_count(provider.notes, count)
        transactions = wal_bytes = None
        if database is not None and contender.recorded is not None and before is not None:
            await until_recorded(server, database, contender.recorded, count)
            await process.stop()
            after = await server.counters(database)
            transactions = (after.transactions - before.transactions) / count
            wal_bytes = (after.wal_bytes - before.wal_bytes) / count
        else:
            await process.exited()
        if len(provider.notes) != count:
            raise RuntimeError(f"{contender.name} sent {len(provider.notes)} of {count} messages")
        messages = last.arrived - first.arrived
        return Result(
            rate(provider.notes),
            (last.worker - first.worker) / messages,
            (last.provider - first.provider) / messages,
            (last.database - first.database) / messages,
            transactions,
            wal_bytes,
            memory,
        )


async def until_recorded(server: Server, database: str, query: str, count: int) -> None:
    """Wait until so many answers are kept."""
    async with server.connection(database) as connection, asyncio.timeout(PATIENCE):
        while await connection.fetchval(query) < count:  # noqa: ASYNC110 - the database has no event
            await asyncio.sleep(0.1)
