"""A whole answer is taken as it came, however it is put; one too large is left alone."""

import asyncio
import gzip
import tracemalloc
import zlib

import pytest

from dispatcher.line import MAX_ANSWER
from dispatcher.provider import Answer, InDoubt
from tests.integration.wire.client import client, send
from tests.integration.wire.raw_provider import RawProvider, Received

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("raw_answer", "body"),
    [
        (OK + b"Content-Length: 8\r\n\r\nMSG_OK:1", b"MSG_OK:1"),
        (OK + b"content-length:8\r\n\r\nMSG_OK:1", b"MSG_OK:1"),
        (OK + b"Content-Length: 8\r\nConnection: close\r\n\r\nMSG_OK:1", b"MSG_OK:1"),
        (OK + b"Content-Length: 0\r\n\r\n", b""),
        (OK + b"Content-Length: 13\r\n\r\n\r\n MSG_OK:1\r\n", b"\r\n MSG_OK:1\r\n"),
        (OK + b"Content-Length: 5\r\n\r\n\x00\xff\xfe\r\n", b"\x00\xff\xfe\r\n"),
        (
            OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nMSG\r\n5;x=y\r\n_OK:1\r\n0\r\n\r\n",
            b"MSG_OK:1",
        ),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\nMSG_OK:1", b"MSG_OK:1"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 6\r\n\r\nMSG_OK", b"MSG_OK"),
        (
            OK + b"Content-Length: %d\r\n\r\n" % MAX_ANSWER + b"x" * MAX_ANSWER,
            b"x" * MAX_ANSWER,
        ),
        (OK + b"Set-Cookie: a=b; Path=/\r\nContent-Length: 6\r\n\r\nMSG_OK", b"MSG_OK"),
    ],
)
@pytest.mark.parametrize("dripped", [False, True], ids=["at once", "dripped"])
async def test_a_whole_answer_is_taken_as_it_came(
    raw: RawProvider, raw_answer: bytes, body: bytes, *, dripped: bool
) -> None:
    """However an answer is framed, and though it comes a byte at a time, its body is the same."""

    async def script(request: Received) -> None:
        if not dripped:
            await request.line.write(raw_answer)
            return
        for byte in raw_answer:
            request.line.write_now(bytes([byte]))
            await asyncio.sleep(0)

    raw.script = script
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert (reply.status, reply.body) == (200, body)
    assert reply.seconds > 0
    assert len(raw.requests) == 1


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_that_ends_with_the_connection_is_whole(
    raw: RawProvider, version: bytes
) -> None:
    """A body without a length that ends in order is an answer."""

    async def script(request: Received) -> None:
        await request.line.write(b"HTTP/%b 200 OK\r\n\r\n" % version, b"MSG_", b"OK:1")
        request.line.hang_up()

    raw.script = script
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert reply.body == b"MSG_OK:1"


@pytest.mark.parametrize("status", [b"201 Created", b"400 Bad", b"404 Not Found", b"503 Busy"])
async def test_any_status_is_an_answer(raw: RawProvider, status: bytes) -> None:
    """What a status means is for others to judge."""

    async def script(request: Received) -> None:
        await request.line.answer(b"MSG_OK:1", status)

    raw.script = script
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert (reply.status, reply.body) == (int(status[:3]), b"MSG_OK:1")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_status_without_a_body_is_an_answer(raw: RawProvider, status: bytes) -> None:
    """Nothing is waited for after a status that has no body, and the connection is kept."""

    async def script(request: Received) -> None:
        await request.line.write(b"HTTP/1.1 %b\r\n\r\n" % status)

    raw.script = script
    async with client(raw.url) as provider:
        replies = [await send(provider), await send(provider)]
    for reply in replies:
        assert isinstance(reply, Answer)
        assert (reply.status, reply.body) == (int(status[:3]), b"")
    assert (len(raw.requests), len(raw.lines)) == (2, 1)


async def test_a_cookie_is_not_sent_back(raw: RawProvider) -> None:
    """A request holds what the protocol asks for and nothing that an earlier answer left."""

    async def script(request: Received) -> None:
        await request.line.write(OK + b"Set-Cookie: a=b; Path=/\r\nContent-Length: 6\r\n\r\nMSG_OK")

    raw.script = script
    # To a name, as an address's cookies would not be kept anyway.
    async with client(raw.url.replace("127.0.0.1", "localhost")) as provider:
        for _ in range(2):
            assert isinstance(await send(provider), Answer)
    assert raw.requests[0].head == raw.requests[1].head


async def test_a_kept_connection_carries_every_request(raw: RawProvider) -> None:
    """One after the other, a hundred messages need one connection."""
    async with client(raw.url) as provider:
        for number in range(1, 101):
            reply = await send(provider)
            assert isinstance(reply, Answer)
            assert reply.body == b"MSG_OK:%d" % number
    assert (len(raw.requests), len(raw.lines)) == (100, 1)


async def test_an_endless_answer_is_cut_off(raw: RawProvider) -> None:
    """Of 400 MB a few are sent and next to nothing is held."""
    piece = b"x" * 1_000_000
    written = 0

    async def script(request: Received) -> None:
        nonlocal written
        await request.line.write(OK + b"Content-Length: 400000000\r\n\r\n")
        for _ in range(400):
            await request.line.write(piece)
            written += len(piece)

    raw.script = script
    async with client(raw.url) as provider:
        tracemalloc.start()
        try:
            reply = await send(provider)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await raw.all_closed()
    assert isinstance(reply, InDoubt)
    assert reply.reason == "answer too long"
    assert len(raw.requests) == 1
    assert written < 40_000_000
    assert peak < 8_000_000


async def test_a_compressed_answer_is_not_inflated(raw: RawProvider) -> None:
    """A gzip bomb is what it is on the wire: a few bytes, which are no answer of the table."""
    bomb = gzip.compress(gzip.compress(b"0" * 100_000_000, mtime=0), mtime=0)
    assert len(bomb) < MAX_ANSWER

    async def script(request: Received) -> None:
        await request.line.write(
            OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
        )

    raw.script = script
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert reply.body == bomb
    assert len(zlib.decompress(zlib.decompress(bomb, wbits=31), wbits=31)) == 100_000_000
