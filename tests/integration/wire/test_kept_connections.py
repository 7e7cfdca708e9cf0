"""A kept connection that has gone bad costs no message: nothing is written to it."""

import asyncio

import pytest

from dispatcher.provider import Answer, NeverLeft
from tests.integration.wire.client import client, send
from tests.integration.wire.raw_provider import RawProvider, Received, well


async def test_a_connection_closed_while_idle_is_replaced(raw: RawProvider) -> None:
    """A provider that closes before our keep-alive ends gets the next request anew, once."""
    async with client(raw.url) as provider:
        await send(provider)
        raw.lines[0].hang_up()
        await raw.all_closed()
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_a_connection_closed_unseen_is_replaced(raw: RawProvider) -> None:
    """A close that the event loop has not read yet is seen before the request is written."""
    async with client(raw.url) as provider:
        await send(provider)
        raw.lines[0].hang_up()
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_connections_that_all_closed_at_once_are_replaced(raw: RawProvider) -> None:
    """Many that ended while idle are not tried one after the other; a new one is opened."""
    together = asyncio.Barrier(10)

    async def rush(request: Received) -> None:
        await together.wait()
        await well(request)

    raw.script = rush
    async with client(raw.url, concurrency=10) as provider:
        await asyncio.gather(*(send(provider) for _ in range(10)))
        raw.script = well
        for line in raw.lines:
            line.hang_up()
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert (len(raw.requests), len(raw.lines)) == (11, 11)


async def test_an_answer_nobody_asked_for_is_nobodys(raw: RawProvider) -> None:
    """A second answer on a kept connection is never taken for the next message's."""
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nMSG_OK:666"
    async with client(raw.url) as provider:
        for read_by_the_loop in (False, True):
            await send(provider)
            raw.lines[-1].write_now(stray)
            if read_by_the_loop:
                await asyncio.sleep(0.05)
            reply = await send(provider)
            assert isinstance(reply, Answer)
            assert reply.body == b"MSG_OK:%d" % len(raw.requests)
            assert raw.requests[-1].on_connection == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nMSG_OK:666", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Len", b"gth: 10\r\n\r\nMSG_OK:666"),
        (b"H", b"TTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nMSG_OK:666"),
    ],
    ids=["whole", "half", "one byte"],
)
async def test_what_comes_unasked_ends_a_connection(
    raw: RawProvider, before: bytes, after: bytes
) -> None:
    """Not even the beginning of an answer that nobody asked for is waited for or built upon."""

    async def go_on(request: Received) -> None:
        if request.on_connection > 1:
            await request.line.write(after)
        await well(request)

    raw.script = go_on
    async with client(raw.url) as provider:
        await send(provider)
        raw.lines[0].write_now(before)
        await asyncio.sleep(0.05)
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert reply.body == b"MSG_OK:2"
    assert [request.on_connection for request in raw.requests] == [1, 1]


@pytest.mark.parametrize(
    ("begun", "rest"),
    [
        (b"H", b"TTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nMSG_OK:666"),
        (b"HTTP/1.1 200 OK\r\n", b"Content-Length: 10\r\n\r\nMSG_OK:666"),
        (
            b"HTTP/1.1 100 Continue\r\n",
            b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nMSG_OK:666",
        ),
    ],
    ids=["one byte", "half", "half a promise"],
)
async def test_what_begins_behind_an_answer_ends_its_connection(
    raw: RawProvider, begun: bytes, rest: bytes
) -> None:
    """What comes with an answer and is not part of it is not built upon either."""

    async def and_more(request: Received) -> None:
        if request.on_connection > 1:
            await request.line.write(rest)
        body = b"MSG_OK:%d" % request.number
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        await request.line.write(head + body + begun)

    raw.script = and_more
    async with client(raw.url) as provider:
        for number in (1, 2):
            reply = await send(provider)
            assert isinstance(reply, Answer)
            assert reply.body == b"MSG_OK:%d" % number
    assert [request.on_connection for request in raw.requests] == [1, 1]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 6\r\n\r\nMSG_OK",
        b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nMSG_OK",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n",
    ],
    ids=["closes", "speaks HTTP/1.0", "speaks another protocol"],
)
async def test_a_connection_is_not_used_after_an_answer_that_ends_it(
    raw: RawProvider, head: bytes
) -> None:
    """What a provider has said is the last answer of a connection is, though it stays open."""

    async def last(request: Received) -> None:
        await request.line.write(head)

    raw.script = last
    async with client(raw.url) as provider:
        for _ in range(2):
            assert isinstance(await send(provider), Answer)
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_an_answer_given_twice_at_once_is_taken_once(raw: RawProvider) -> None:
    """Two answers to one request: the first counts, and the connection is not used again."""

    async def twice(request: Received) -> None:
        body = b"MSG_OK:%d" % request.number
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        await request.line.write(answer + answer)

    raw.script = twice
    async with client(raw.url) as provider:
        for number in range(1, 4):
            reply = await send(provider)
            assert isinstance(reply, Answer)
            assert reply.body == b"MSG_OK:%d" % number
    assert len(raw.lines) == 3


async def test_a_provider_that_closes_after_each_answer_unannounced(raw: RawProvider) -> None:
    """With every kept connection about to close, each message still arrives at most once."""

    async def answer_and_close(request: Received) -> None:
        request.line.write_now(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nMSG_OK")
        request.line.hang_up()

    raw.script = answer_and_close
    async with client(raw.url, concurrency=20) as provider:
        pending = [f"text {number}" for number in range(200)]
        replies = {}

        async def sender() -> None:
            while pending:
                text = pending.pop()
                replies[text] = await send(provider, text)

        await asyncio.gather(*(sender() for _ in range(20)))
    arrived = [dict(request.parameters)["text"] for request in raw.requests]
    assert len(arrived) == len(set(arrived))
    for text, reply in replies.items():
        assert isinstance(reply, Answer | NeverLeft)
        assert (text in arrived) == isinstance(reply, Answer)
    assert sum(isinstance(reply, Answer) for reply in replies.values()) > 190


async def test_the_keep_alive_ends_on_our_side_first(raw: RawProvider) -> None:
    """A connection that has been idle for longer than the keep-alive is not used again."""
    raw.script = well
    async with client(raw.url, keepalive=0.05) as provider:
        await send(provider)
        await raw.all_closed()
        await send(provider)
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_a_message_that_waits_gets_the_connection_of_another(raw: RawProvider) -> None:
    """With one connection, messages that come together go one after the other on it."""
    async with client(raw.url, concurrency=1) as provider:
        replies = await asyncio.gather(*(send(provider) for _ in range(5)))
    assert all(isinstance(reply, Answer) for reply in replies)
    assert [request.on_connection for request in raw.requests] == [1, 2, 3, 4, 5]


async def test_connections_that_nobody_needs_are_closed_beside_one_that_is_used(
    raw: RawProvider,
) -> None:
    """After a rush, the keep-alive ends for the connections that it alone needed."""
    rush = asyncio.Barrier(5)

    async def together(request: Received) -> None:
        if request.number <= 5:
            await rush.wait()
        await well(request)

    raw.script = together
    async with client(raw.url, keepalive=1) as provider:
        await asyncio.gather(*(send(provider) for _ in range(5)))
        assert len(raw.lines) == 5
        async with asyncio.timeout(20):
            while raw.open > 1:
                await send(provider)
                await asyncio.sleep(0.01)
        await send(provider)
    assert len(raw.lines) == 5
