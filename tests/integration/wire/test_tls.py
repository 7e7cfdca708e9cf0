"""The same over TLS, with a certificate authority of our own."""

import asyncio
import ssl
from collections.abc import AsyncIterator

import aiohttp.connector
import pytest
import trustme
from yarl import URL

from dispatcher.connections import Connections
from dispatcher.line import Line
from dispatcher.provider import Answer, InDoubt, NeverLeft
from tests.integration.wire.client import client, send
from tests.integration.wire.raw_provider import RawProvider, Received, well


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Signs the provider's certificate."""
    return trustme.CA()


@pytest.fixture
async def raw(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RawProvider]:
    """A raw provider that speaks TLS, and is trusted."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    # Made once, when aiohttp is imported; SSL_CERT_FILE would come too late.
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    async with RawProvider(tls=server) as raw:
        yield raw


async def test_messages_go_over_one_kept_connection(raw: RawProvider) -> None:
    """The handshake is made once."""
    async with client(raw.url) as provider:
        for number in range(1, 101):
            reply = await send(provider)
            assert isinstance(reply, Answer)
            assert reply.body == b"MSG_OK:%d" % number
    assert len(raw.lines) == 1


async def test_many_at_once(raw: RawProvider) -> None:
    """Each message is received once and gets its own answer."""
    async with client(raw.url, concurrency=10) as provider:
        replies = await asyncio.gather(*(send(provider, f"text {n}") for n in range(100)))
    assert {reply.body for reply in replies if isinstance(reply, Answer)} == {
        b"MSG_OK:%d" % number for number in range(1, 101)
    }
    assert len({dict(request.parameters)["text"] for request in raw.requests}) == 100


async def test_an_answer_in_pieces_is_one(raw: RawProvider) -> None:
    """However it is cut into records."""

    async def in_pieces(request: Received) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nMSG_OK:1":
            await request.line.write(bytes([byte]))

    raw.script = in_pieces
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert reply.body == b"MSG_OK:1"


async def test_a_connection_that_breaks_puts_the_message_in_doubt(raw: RawProvider) -> None:
    """Cut within the answer, the message is in doubt, and the next one has a new connection."""

    async def cut(request: Received) -> None:
        await request.line.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nMSG_")
        request.line.writer.transport.abort()

    raw.script = cut
    async with client(raw.url) as provider:
        reply = await send(provider)
        assert isinstance(reply, InDoubt)
        assert reply.received in {b"MSG_", b""}
        raw.script = well
        assert isinstance(await send(provider), Answer)
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_a_connection_closed_while_idle_is_replaced(raw: RawProvider) -> None:
    """The provider says goodbye, and nothing is written to it any more."""
    async with client(raw.url) as provider:
        await send(provider)
        raw.lines[0].writer.close()
        await raw.all_closed()
        await asyncio.sleep(0.05)
        assert isinstance(await send(provider), Answer)
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_an_answer_nobody_asked_for_is_nobodys(raw: RawProvider) -> None:
    """What lies in the socket when the next message is to go is read first, whatever it is."""
    async with client(raw.url) as provider:
        await send(provider)
        raw.lines[0].writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nMSG_OK:666")
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert reply.body == b"MSG_OK:2"
    assert [request.on_connection for request in raw.requests] == [1, 1]


async def test_a_provider_that_closes_after_each_answer(raw: RawProvider) -> None:
    """Nothing is written to a connection whose end waits in the socket."""

    async def answer_and_close(request: Received) -> None:
        await request.line.answer()
        request.line.writer.close()

    raw.script = answer_and_close
    async with client(raw.url, concurrency=5) as provider:
        for _ in range(10):
            replies = await asyncio.gather(*(send(provider) for _ in range(5)))
            assert all(isinstance(reply, Answer) for reply in replies)
    assert len(raw.requests) == 50


async def test_a_line_whose_end_was_read_is_not_asked(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written after an end without TLS's goodbye, and before its loss is told, is lost."""
    connections = Connections(URL(raw.url), limit=1, keepalive=30)
    line = await connections.open()
    await line.ask(b"GET / HTTP/1.1\r\nHost: provider\r\n\r\n")
    ready_after_its_end: list[bool] = []
    lost = asyncio.Event()

    def look_soon() -> None:
        asyncio.get_running_loop().call_soon(lambda: ready_after_its_end.append(line.ready))

    def eof_received() -> None:
        look_soon()
        Line.eof_received(line)

    def connection_lost(error: BaseException | None) -> None:
        look_soon()
        Line.connection_lost(line, error)
        asyncio.get_running_loop().call_soon(lost.set)

    # asyncio's TLS tells of the end a turn before the loss; uvloop's tells of the loss only.
    monkeypatch.setattr(line, "eof_received", eof_received)
    monkeypatch.setattr(line, "connection_lost", connection_lost)
    raw.lines[0].writer.transport.abort()
    async with asyncio.timeout(20):
        await lost.wait()
    assert set(ready_after_its_end) == {False}
    line.close()
    await connections.close()


async def test_a_provider_that_is_not_trusted_gets_nothing(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that nobody has signed ends the attempt before the request."""
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", ssl.create_default_context())
    async with client(raw.url) as provider:
        assert await send(provider) == NeverLeft("TLS handshake failed")
    assert not raw.requests
