"""What other sessions tell: new messages, an egress that closed or opened, a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from dispatcher.db.pool import FAILURES, DatabaseLost, connect, lost, reason

CHANNEL: Final = "dispatcher"
HEARTBEAT: Final = 10.0
"""Seconds between two looks whether the connection still lives."""


async def listen(dsn: str, heard: Callable[[str], None], *, timeout: float) -> None:
    """Call `heard` with each payload until the connection is lost; then raises DatabaseLost.

    Calls it once with `""` when it begins to listen, for what was missed until then.
    """
    connection = await connect(dsn, name="dispatcher listen", timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            await connection.add_listener(
                CHANNEL, lambda _connection, _pid, _channel, payload: heard(str(payload))
            )
        gone = asyncio.Event()
        connection.add_termination_listener(lambda _connection: gone.set())
        heard("")
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT):
                    await gone.wait()
            except TimeoutError:
                async with asyncio.timeout(timeout):
                    await connection.fetchval("SELECT 1")
            else:
                raise DatabaseLost("the connection was closed")
    except FAILURES as error:
        if not lost(error):
            raise
        raise DatabaseLost(reason(error)) from None
    finally:
        connection.terminate()
