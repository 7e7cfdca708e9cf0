"""Real processes for tests from outside: workers, simulators, and waiting for what they do.

async with simulator(services=[{"id": 42, "day": 3}]) as provider:
    async with worker(database, provider.url, ban_backoff=1) as running:
        await running.event("message.accepted")
        assert await running.stop() == 0
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM, Signals
from typing import Any, Final, Self, TypeAlias, TypeVar

import aiohttp
import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Event: TypeAlias = dict[str, Any]
T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]

PATIENCE: Final = 45.0
"""Seconds after which a condition is taken never to come; no test passes by it."""

LOOK: Final = 0.02
"""Seconds between two looks at a condition."""

QUICK: Final = {"poll_interval": 0.1, "concurrency": 20, "keepalive": 1, "drain": 10}
"""Settings of a worker in a test, unless it says otherwise."""


async def wait_for(
    condition: Callable[[], Awaitable[T]], what: str, *, within: float = PATIENCE
) -> T:
    """Look until the condition is true and return it; fails, saying what never came."""
    found: T | None = None
    try:
        async with asyncio.timeout(within):
            while True:
                found = await condition()
                if found:
                    return found
                await asyncio.sleep(LOOK)
    except TimeoutError:
        raise AssertionError(f"it never came: {what} (last seen: {found!r})") from None


class Running:
    """A process of ours, and the JSON lines that it prints."""

    def __init__(self, process: asyncio.subprocess.Process, label: str) -> None:
        self.process = process
        self.label = label
        self.events: list[Event] = []
        """All lines so far, in order."""
        self.errors = ""
        """All that came on standard error."""
        self._came = asyncio.Condition()
        self._readers = asyncio.gather(self._read_events(), self._read_errors())

    @classmethod
    async def start(cls, *arguments: str, folder: Path, **environment: str) -> Self:
        """Start `dispatcher` with arguments in a folder, with no setting but those given."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name != "DATABASE_URL" and not name.startswith("DISPATCHER_")
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dispatcher", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env={**inherited, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **environment},
            limit=2**24,
        )
        return cls(process, " ".join(arguments))

    async def _read_events(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            async with self._came:
                self.events.append(json.loads(line))
                self._came.notify_all()
        async with self._came:
            self._came.notify_all()

    async def _read_errors(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            self.errors += line.decode()

    def seen(self, name: str, **fields: object) -> list[Event]:
        """The events of a name, with these values in their fields, that came so far."""
        return [
            event
            for event in list(self.events)
            if event.get("event") == name
            and all(event.get(field) == value for field, value in fields.items())
        ]

    async def event(
        self, name: str, *, nth: int = 1, within: float = PATIENCE, **fields: object
    ) -> Event:
        """Wait for the nth event of a name with these values in its fields."""

        def come() -> bool:
            return len(self.seen(name, **fields)) >= nth or self._readers.done()

        try:
            async with asyncio.timeout(within), self._came:
                await self._came.wait_for(come)
        except TimeoutError:
            pass
        found = self.seen(name, **fields)
        if len(found) < nth:
            names = [event.get("event") for event in self.events]
            raise AssertionError(
                f"'{self.label}' told {name} {fields} {len(found)} times, not {nth}: "
                f"exit code {self.process.returncode}, stderr {self.errors!r}, events {names}"
            )
        return found[nth - 1]

    def signal(self, number: Signals) -> None:
        """Send a signal; SIGSTOP freezes the process, SIGCONT thaws it."""
        self.process.send_signal(number)

    async def exited(self, within: float = PATIENCE) -> int:
        """Wait for the end of the process and of its output; returns the exit code."""
        async with asyncio.timeout(within):
            code = await self.process.wait()
            await self._readers
        return code

    async def stop(self, number: Signals = SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.signal(number)
        return await self.exited()

    async def kill(self) -> None:
        """End the process at once, as a crash would."""
        await self.stop(SIGKILL)

    async def close(self) -> None:
        """End the process if it still runs: politely, so that its coverage is kept."""
        if self.process.returncode is None:
            self.signal(SIGCONT)
            self.signal(SIGTERM)
            try:
                await self.exited(within=20)
            except TimeoutError:
                await self.kill()
        await self.exited()
        # `process.wait` returns before the transport has seen all pipes close.
        await asyncio.sleep(0)


class Worker(Running):
    """`dispatcher run` in a process of its own."""

    folder: Path
    """Its data directory, with the spool in it."""

    async def started(self) -> int:
        """Wait until it has entered itself among the workers; returns its number."""
        return int((await self.event("worker.started"))["worker_id"])

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of its answer to a GET."""
        port = (await self.event("http.listening"))["port"]
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as answer,
        ):
            return answer.status, await answer.text()


class Provider(Running):
    """`dispatcher simulator` in a process of its own."""

    address: str

    @property
    def url(self) -> str:
        """What DISPATCHER_PROVIDER_URL is set to."""
        return f"{self.address}/users/send_bulk.php"

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    async def received(self) -> dict[str, Any]:
        """The summary of all that came."""
        found: dict[str, Any] = json.loads(await self._ask("GET", "/simulator/received"))
        return found

    async def messages(self) -> list[dict[str, Any]]:
        """Every request that came, with its answer and its fault, in order."""
        return [
            json.loads(line)
            for line in (await self._ask("GET", "/simulator/messages")).split("\n")
            if line
        ]

    async def set(self, **changes: object) -> None:
        """Change how it behaves from now on; keys as in its configuration, and ban_now, unban."""
        await self._ask("POST", "/simulator/set", changes)

    async def _ask(self, method: str, path: str, body: object = None) -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.address + path, json=body) as answer,
        ):
            told = await answer.text()
            assert answer.status == 200, told
            return told


@asynccontextmanager
async def worker(
    dsn: str | None, provider_url: str, *, data_dir: Path | None = None, **settings: object
) -> AsyncIterator[Worker]:
    """A worker in a folder of its own; `settings` are named as DISPATCHER_… in small letters.

    It is not waited for: `await running.started()`. On leaving, it is ended if it still runs,
    and must have printed no traceback.
    """
    chosen = {**QUICK, "http_port": 0, "provider_url": provider_url, **settings}
    with tempfile.TemporaryDirectory(prefix="dispatcher-worker-") as name:
        folder = data_dir or Path(name)
        running = await Worker.start(
            "run",
            folder=folder,
            **({} if dsn is None else {"DATABASE_URL": dsn}),
            DISPATCHER_DATA_DIR=str(folder),
            **{f"DISPATCHER_{key.upper()}": str(value) for key, value in chosen.items()},
        )
        running.folder = folder
        try:
            yield running
        finally:
            await running.close()
        assert "Traceback" not in running.errors, running.errors


@asynccontextmanager
async def simulator(**config: object) -> AsyncIterator[Provider]:
    """A simulator with a configuration as in its --config file, ready to answer."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-simulator-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        running = await Provider.start(
            "simulator", "--json", "--config", "config.json", folder=folder
        )
        try:
            running.address = (await running.event("listening"))["url"]
            yield running
        finally:
            await running.close()


def midday() -> str:
    """A time zone, known to PostgreSQL and to Python, in which no window ends soon."""
    west = datetime.now(UTC).hour - 12
    return f"Etc/GMT{west:+}"


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def statuses(connection: Connection) -> dict[str, int]:
    """How many messages there are of each status."""
    rows = await connection.fetch("SELECT status, count(*) FROM outbox GROUP BY status")
    return {row["status"]: row["count"] for row in rows}


async def until_statuses(
    connection: Connection, *, within: float = PATIENCE, **expected: int
) -> None:
    """Wait until there are exactly so many messages of each status."""
    last: dict[str, int] = {}

    async def there() -> bool:
        nonlocal last
        last = await statuses(connection)
        return last == expected

    try:
        await wait_for(there, f"the statuses {expected}", within=within)
    except AssertionError:
        raise AssertionError(f"the statuses stay {last}, not {expected}") from None


async def message(connection: Connection, message_id: int) -> asyncpg.Record:
    """One row of the outbox."""
    row = await connection.fetchrow("SELECT * FROM outbox WHERE id = $1", message_id)
    assert row is not None
    return row
