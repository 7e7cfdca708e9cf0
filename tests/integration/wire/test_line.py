"""A connection as it passes between aiohttp, which opens and closes it, and the client."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from yarl import URL

from dispatcher.connections import Connections
from dispatcher.line import Line, NoAnswer, Whole
from tests.integration.wire.raw_provider import RawProvider, Received

REQUEST = b"GET / HTTP/1.1\r\nHost: provider\r\n\r\n"


@pytest.fixture
async def connections(raw: RawProvider) -> AsyncIterator[Connections]:
    """Connections to the raw provider."""
    connections = Connections(URL(raw.url), limit=10, keepalive=30)
    yield connections
    await connections.close()


async def test_a_line_is_asked_once_after_the_other(connections: Connections) -> None:
    """Each request has its own answer, and nothing of it is kept."""
    line = await connections.open()
    for number in (1, 2):
        assert line.ready
        assert await line.ask(REQUEST) == Whole(200, b"MSG_OK:%d" % number)
        assert line.received == b""
    line.release()


async def test_a_line_is_not_used_after_a_failure(
    raw: RawProvider, connections: Connections
) -> None:
    """An answer that could not be read leaves bytes of which nobody knows what they are."""

    async def nonsense(request: Received) -> None:
        await request.line.write(b"MSG_OK\r\n\r\n")

    raw.script = nonsense
    line = await connections.open()
    with pytest.raises(NoAnswer, match=r"^answer is not HTTP$"):
        await line.ask(REQUEST)
    assert not line.usable
    line.release()
    await raw.all_closed()


async def test_a_line_that_is_lost_is_not_asked(raw: RawProvider, connections: Connections) -> None:
    """A request that nobody can get is an error of the caller's."""
    line = await connections.open()
    await raw.connected.wait()
    raw.lines[0].hang_up()
    async with asyncio.timeout(20):
        while line.usable:  # noqa: ASYNC110 - a line tells nobody of its end
            await asyncio.sleep(0.001)
    with pytest.raises(RuntimeError, match="not ready"):
        await line.ask(REQUEST)
    line.close()


async def test_what_comes_while_aiohttp_keeps_a_line_spoils_it(
    raw: RawProvider, connections: Connections
) -> None:
    """Handed back and taken again, a line knows what came unasked meanwhile."""
    line = await connections.open()
    line.release()
    await raw.connected.wait()
    raw.lines[0].write_now(b"HTTP/1.1 200 OK\r\n")
    await asyncio.sleep(0.05)
    again = await connections.open()
    assert len(raw.lines) == 1, "it is the same one"
    assert not again.usable
    again.close()


async def test_closing_ends_lines_that_are_in_use(
    raw: RawProvider, connections: Connections
) -> None:
    """aiohttp waits for the ends of its connections and hears of those it has handed over."""
    line = await connections.open()
    async with asyncio.timeout(20):
        await connections.close()
        await raw.all_closed()
    assert not line.usable
    line.close()


async def begun(raw: RawProvider, connections: Connections) -> tuple[Line, asyncio.Future[Whole]]:
    """A line on which an answer without a length has begun to come."""

    async def without_length(request: Received) -> None:
        await request.line.write(b"HTTP/1.1 200 OK\r\n\r\nMSG_OK:12")

    raw.script = without_length
    line = await connections.open()
    answer = line.ask(REQUEST)
    async with asyncio.timeout(20):
        while not line.received:  # noqa: ASYNC110 - a line tells nobody of a part
            await asyncio.sleep(0.001)
    return line, answer


async def test_an_answer_that_our_own_close_ends_is_cut_short(
    raw: RawProvider, connections: Connections
) -> None:
    """Without a length only the provider's own close says that this was all."""
    line, answer = await begun(raw, connections)
    await connections.close()
    with pytest.raises(NoAnswer, match=r"^answer cut short$"):
        await answer
    line.close()


async def test_an_end_for_whatever_error_is_not_in_order(
    raw: RawProvider, connections: Connections
) -> None:
    """What the event loop could not read on may have been the rest of the answer."""
    line, answer = await begun(raw, connections)
    line.connection_lost(MemoryError())
    with pytest.raises(NoAnswer, match=r"^answer cut short$"):
        await answer
    line.close()


async def test_a_line_that_is_sent_something_unasked_is_closed(
    raw: RawProvider, connections: Connections
) -> None:
    """A provider that floods an idle connection is hung up on."""
    connections.give_back(await connections.open())
    await raw.connected.wait()
    raw.lines[0].write_now(b"x")
    async with asyncio.timeout(20):
        await raw.all_closed()


async def test_a_line_has_one_request_at_a_time(connections: Connections) -> None:
    """The second one's answer would be taken for the first one's."""
    line = await connections.open()
    answer = line.ask(REQUEST)
    ready = [line.ready]
    with pytest.raises(RuntimeError, match="not ready"):
        await line.ask(REQUEST)
    assert await answer == Whole(200, b"MSG_OK:1")
    ready.append(line.ready)
    assert ready == [False, True]
    line.release()
