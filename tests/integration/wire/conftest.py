"""The wire tests run on both event loops: they differ in how they read, write and close."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from tests.integration.wire.raw_provider import RawProvider


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Runs each test once on either loop."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def raw() -> AsyncIterator[RawProvider]:
    """A provider of bare sockets that answers well until its script is changed."""
    async with RawProvider() as raw:
        yield raw
