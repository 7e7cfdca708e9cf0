"""What fails before the first byte has never left, and the reply says so."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dispatcher.provider import InDoubt, NeverLeft
from tests.integration.wire.client import client, send
from tests.integration.wire.raw_provider import Line, RawProvider


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that is taken and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def full_port() -> Iterator[int]:
    """A port whose queue is full, so that a connection is neither made nor refused."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(address)
        yield address[1]


async def test_a_refused_connection_never_left(deaf_port: int) -> None:
    """Nobody listens."""
    async with client(f"http://127.0.0.1:{deaf_port}/") as provider:
        assert await send(provider) == NeverLeft("connection refused")


async def test_every_address_of_a_name_is_tried_and_refused(deaf_port: int) -> None:
    """A name with several addresses, none of which listens."""
    async with client(f"http://localhost:{deaf_port}/") as provider:
        reply = await send(provider)
    assert isinstance(reply, NeverLeft)
    assert reply.reason in {"connection refused", "connection failed"}


async def test_an_unknown_name_never_left() -> None:
    """The top-level domain `invalid` has no names, by RFC 6761."""
    async with client("http://nowhere.invalid/") as provider:
        assert await send(provider) == NeverLeft("name lookup failed")


async def test_an_address_in_no_usual_form_never_left() -> None:
    """A number that some libraries would take for an address is not looked up."""
    async with client("http://2130706433/") as provider:
        assert await send(provider) == NeverLeft("connection failed")


async def test_a_connection_that_is_not_made_in_time_never_left(full_port: int) -> None:
    """The deadline before the write."""
    async with client(f"http://127.0.0.1:{full_port}/", timeout=0.3) as provider:
        assert await send(provider) == NeverLeft("connect timeout")


async def test_a_message_without_a_free_connection_never_left(raw: RawProvider) -> None:
    """The deadline while another message has the only connection in hand."""
    waiting, due = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await due.wait()

    async with client(raw.url, timeout=0.5, concurrency=1) as provider:
        first = asyncio.create_task(send(provider, wait=wait))
        await waiting.wait()
        assert await send(provider) == NeverLeft("connect timeout")
        assert not raw.requests
        due.set()
        await first


async def test_a_failed_handshake_never_left(raw: RawProvider) -> None:
    """TLS to a provider that speaks none: what it got was no request."""
    async with client(raw.url.replace("http:", "https:")) as provider:
        pending = asyncio.create_task(send(provider))
        await raw.connected.wait()
        await raw.lines[0].answer()
        reply = await pending
    assert reply == NeverLeft("TLS handshake failed")
    assert not raw.requests


async def test_a_connection_closed_when_it_is_made_is_no_answer(raw: RawProvider) -> None:
    """A provider that hangs up on everybody has at most tried to read the request."""
    raw.on_connect = Line.hang_up
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, NeverLeft | InDoubt)
    assert len(raw.requests) <= 1
