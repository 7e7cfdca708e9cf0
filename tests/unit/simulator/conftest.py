"""What the simulator's tests share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from dispatcher.simulator.server import Simulator
from tests.unit.simulator.peers import Connect, RawClient, Script, Until


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens raw connections to a simulator, and closes them at the end."""
    opened: list[RawClient] = []

    async def connect(simulator: Simulator, ip: str = "127.0.0.1") -> RawClient:
        address = urlsplit(simulator.address)
        streams = await asyncio.open_connection(address.hostname, address.port, local_addr=(ip, 0))
        opened.append(RawClient(*streams))
        return opened[-1]

    yield connect
    for client in opened:
        await client.close()


@pytest.fixture
async def script() -> AsyncIterator[Script]:
    """A running script for delivery reports, its gate open."""
    script = Script()
    script.gate.set()
    app = web.Application()
    app.router.add_get("/dlr/secret", script.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    script.url = f"http://{host}:{port}/dlr/secret"
    yield script
    await runner.cleanup()


@pytest.fixture
def until() -> Until:
    """Waits for a condition."""

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - what is waited for announces nothing
                await asyncio.sleep(0.005)

    return until
