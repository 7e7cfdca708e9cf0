"""Connections to PostgreSQL that come back by themselves, and the clock at their other end."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

import asyncpg
from asyncpg import Record

from dispatcher import clock
from dispatcher.settings import SettingsError

__all__ = [
    "FAILURES",
    "DatabaseClock",
    "DatabaseLost",
    "Record",
    "Session",
    "connect",
    "lost",
    "reason",
]

PINGS: Final = 12
"""Round trips that the reckoning of the database's clock looks back on."""

_RETRIED: Final = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_LOST_CLASSES: Final = frozenset({"08", "53", "57", "58", "25", "55"})
_LOST_STATES: Final = _RETRIED | {"3D000", "28000", "28P01", "XX000", "XX001", "40003"}

FAILURES: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""What a connection raises when it, or a statement on it, fails."""


class DatabaseLost(Exception):
    """The database cannot be reached, or cannot work now; try again later."""


def lost(error: BaseException) -> bool:
    """Tell whether an error says that the database is away, and not that the statement is wrong."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state[:2] in _LOST_CLASSES or state in _LOST_STATES
    if isinstance(error, asyncpg.InterfaceError):
        return "clos" in str(error)  # asyncpg has no class of its own for a closed connection
    # A connection that the server ends between two statements upsets the client's own state.
    return isinstance(error, OSError | TimeoutError | asyncpg.InternalClientError)


def reason(error: BaseException) -> str:
    """One short phrase for an error of the connection."""
    if isinstance(error, asyncpg.InternalClientError):
        return "the connection was closed"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "its host is not known"
    if isinstance(error, FileNotFoundError):
        return "nothing listens there"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


async def connect(
    dsn: str, *, name: str, timeout: float, planned_once: bool = False
) -> asyncpg.Connection:
    """Open one connection; statements on it end after `timeout` seconds on both sides.

    `planned_once`: plan each statement when it first runs, for any values, and by index even where
    the table is small, as it may have grown by the next run.

    Raises DatabaseLost, and SettingsError if the address cannot be one.
    """
    try:
        async with asyncio.timeout(timeout):
            return await asyncpg.connect(
                dsn,
                timeout=timeout,
                command_timeout=timeout,
                server_settings={
                    "application_name": name,
                    "statement_timeout": str(int(timeout * 1000)),
                    "idle_in_transaction_session_timeout": str(int(timeout * 1000)),
                    "jit": "off",
                    "enable_seqscan": "off" if planned_once else "on",
                    # Else the first five runs would plan anew, which for a claim takes longer
                    # than to run it.
                    "plan_cache_mode": "force_generic_plan" if planned_once else "auto",
                    # An acknowledged claim that a crash could lose would be a second SMS.
                    "synchronous_commit": "on",
                    "timezone": "UTC",
                },
            )
    except (asyncpg.ClientConfigurationError, ValueError) as error:
        raise SettingsError(f"DATABASE_URL is wrong: {reason(error).rstrip('.')}.") from None
    except FAILURES as error:
        if lost(error):
            raise DatabaseLost(reason(error)) from None
        # What the server does not take of the address, asyncpg has handed on to it.
        raise SettingsError(f"DATABASE_URL is wrong: {reason(error).rstrip('.')}.") from None


class Session:
    """One connection, opened when first used and opened anew after it was lost.

    Statements run one after the other. Each raises DatabaseLost when the database is away or did
    not answer in time; whether the statement took effect is then unknown, so each is written to
    be run again.
    """

    def __init__(self, dsn: str, *, name: str, timeout: float, planned_once: bool = False) -> None:
        """`planned_once`: for what may be planned on an empty table, and runs on a full one."""
        self._dsn = dsn
        self._name = name
        self._timeout = timeout
        self._planned_once = planned_once
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        """Run one statement and return its rows."""
        async with self._turn:
            rows: list[Record] = await self._run(lambda connection: connection.fetch(sql, *args))
            return rows

    async def script(self, sql: str) -> None:
        """Run several statements at once, without arguments."""
        async with self._turn:
            await self._run(lambda connection: connection.execute(sql))

    async def copy(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write rows with COPY."""
        async with self._turn:
            await self._run(
                lambda connection: connection.copy_records_to_table(
                    table, columns=list(columns), records=rows
                )
            )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """Hold the connection for one transaction of several statements."""
        async with self._turn:
            connection = await self._open()
            try:
                async with connection.transaction():
                    yield connection
            except FAILURES as error:
                if not lost(error):
                    raise
                self._drop()
                raise DatabaseLost(reason(error)) from None

    async def close(self) -> None:
        """Close the connection, politely if the server still listens."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(1):
                await connection.close()
        except FAILURES:
            connection.terminate()

    async def _run(self, statement: Callable[[asyncpg.Connection], Any]) -> Any:
        for left in (2, 1, 0):
            connection = await self._open()
            try:
                # asyncpg's own timeout waits for the server to take the cancellation, which on
                # a frozen network never comes.
                async with asyncio.timeout(self._timeout):
                    return await statement(connection)
            except FAILURES as error:
                if getattr(error, "sqlstate", None) in _RETRIED and left:
                    continue
                if not lost(error):
                    raise
                self._drop()
                raise DatabaseLost(reason(error)) from None
            except asyncio.CancelledError:
                self._drop()
                raise
        raise AssertionError("unreachable: the last round returns or raises")

    async def _open(self) -> asyncpg.Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(
                self._dsn, name=self._name, timeout=self._timeout, planned_once=self._planned_once
            )
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


class DatabaseClock:
    """The database's clock, told by ours: from the fastest of the last round trips."""

    def __init__(self) -> None:
        self._pings: deque[tuple[float, float]] = deque(maxlen=PINGS)
        self._offset = 0.0

    # Tell the database's time.
    _PING: Final = "SELECT extract(epoch FROM clock_timestamp())::float8 AS now"

    async def ping(self, session: Session, times: int) -> None:
        """Look at the database's clock some times. Raises DatabaseLost."""
        for _ in range(times):
            before = clock.now()
            rows = await session.fetch(self._PING)
            after = clock.now()
            self._pings.append((after - before, rows[0]["now"] - (before + after) / 2))
        self._offset = min(self._pings)[1]

    def local(self, epoch: float) -> float:
        """A time of the database (seconds since 1970) on our clock (`clock.now`)."""
        return epoch - self._offset

    def ahead_of(self, wall: float) -> float:
        """Seconds by which the database's clock is ahead of a wall clock read now."""
        return clock.now() + self._offset - wall
