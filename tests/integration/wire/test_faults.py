"""Whatever a provider does after it has the request, it gets that request once."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dispatcher.line import MAX_ANSWER, Line
from dispatcher.provider import Answer, InDoubt
from tests.integration.wire.client import NUMBER, TEXT, client, send
from tests.integration.wire.raw_provider import RawProvider, Received, Script, well

Fault = Callable[[Received], Coroutine[Any, Any, None]]


def says(*pieces: bytes, then: str = "hang_up") -> Fault:
    """A provider that writes this and then closes the connection."""

    async def script(request: Received) -> None:
        await request.line.write(*pieces)
        getattr(request.line, then)()

    return script


OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 8\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

FAULTS = {
    "hangs up": (says(), "connection closed without an answer"),
    "resets": (says(then="reset"), "connection reset"),
    "cuts the status line": (says(b"HTTP/1.1 20"), None),
    "cuts the status line and resets": (says(b"HTTP/1.1 20", then="reset"), "connection reset"),
    "cuts the headers": (says(OK + b"Content-Le"), None),
    "cuts before the empty line": (says(OK + b"Content-Length: 8\r\n"), None),
    "cuts the body": (says(SIZED + b"MSG_OK:"), "answer cut short"),
    "cuts the whole body": (says(SIZED), "answer cut short"),
    "cuts the body and resets": (says(SIZED + b"MSG_OK:", then="reset"), None),
    "cuts a chunk": (says(CHUNKED + b"8\r\nMSG_OK:"), "answer cut short"),
    "cuts after a chunk": (says(CHUNKED + b"8\r\nMSG_OK:1\r\n"), "answer cut short"),
    "cuts the last chunk": (says(CHUNKED + b"8\r\nMSG_OK:1\r\n0\r\n"), "answer cut short"),
    "cuts after a chunk and resets": (says(CHUNKED + b"8\r\nMSG_OK:1\r\n", then="reset"), None),
    "spoils the chunk's size": (
        says(CHUNKED + b"zz\r\nMSG_OK:1\r\n0\r\n\r\n"),
        "answer is not HTTP",
    ),
    "goes on after the answer": (says(SIZED + b"MSG_OK:1MSG_OK:2"), "answer is not HTTP"),
    "resets a body without length": (says(OK + b"\r\nMSG_OK:1", then="reset"), None),
    "speaks no HTTP": (says(b"MSG_OK:1\r\n\r\n"), "answer is not HTTP"),
    "gives no status": (says(b"HTTP/1.1 OK\r\n\r\n"), "answer is not HTTP"),
    "gives a status of four digits": (says(b"HTTP/1.1 2000 OK\r\n\r\n"), "answer is not HTTP"),
    "gives two lengths": (
        says(OK + b"Content-Length: 6\r\nContent-Length: 8\r\n\r\nMSG_OK:1"),
        "answer is not HTTP",
    ),
    "gives a length below zero": (
        says(OK + b"Content-Length: -1\r\n\r\nMSG_OK:1"),
        "answer is not HTTP",
    ),
    "gives a hundred headers": (
        says(OK + b"X: y\r\n" * 100 + b"Content-Length: 8\r\n\r\nMSG_OK:1"),
        "answer is not HTTP",
    ),
    "gives a header of 100,000 bytes": (
        says(OK + b"X: " + b"y" * 100_000 + b"\r\nContent-Length: 8\r\n\r\nMSG_OK:1"),
        "answer is not HTTP",
    ),
    "answers a byte too many": (
        says(OK + b"Content-Length: 4097\r\n\r\n" + b"x" * (MAX_ANSWER + 1)),
        "answer too long",
    ),
    "answers a byte too many in chunks": (
        says(CHUNKED + b"1\r\nx\r\n" * (MAX_ANSWER + 1) + b"0\r\n\r\n"),
        "answer too long",
    ),
    "promises only": (says(b"HTTP/1.1 100 Continue\r\n\r\n" * 3), None),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
async def test_a_fault_after_the_request_is_in_doubt_and_the_request_came_once(
    raw: RawProvider, fault: Fault, reason: str | None, *, kept: bool
) -> None:
    """A provider that breaks off has the request once, on a fresh and on a kept connection."""
    async with client(raw.url) as provider:
        if kept:
            assert isinstance(await send(provider), Answer)
        raw.script = fault
        reply = await send(provider)
    assert isinstance(reply, InDoubt)
    assert reason is None or reply.reason == reason
    assert len(raw.requests) == 1 + kept
    assert raw.requests[-1].on_connection == 1 + kept
    assert len(raw.lines) == 1, "no second connection for a repeat"
    assert not raw.rests


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
async def test_a_fault_leaves_nothing_behind(
    raw: RawProvider, fault: Fault, reason: str | None
) -> None:
    """After a fault the next message goes on a connection of its own and has its own answer."""
    raw.script = fault
    async with client(raw.url, concurrency=1) as provider:
        await send(provider)
        raw.script = well
        reply = await send(provider)
    assert isinstance(reply, Answer)
    assert reply.body == b"MSG_OK:2"
    assert len(raw.lines) == 2


@pytest.mark.parametrize(
    ("fault", "received"),
    [
        (says(OK + b"Content-Length: 80\r\n\r\nMSG_OK:1"), b"MSG_OK:1"),
        (says(OK + b"Content-Length: 5000\r\n\r\n" + b"x" * 5000), b"x" * (MAX_ANSWER + 1)),
        (says(b"HTTP/1.1 20"), b""),
    ],
    ids=["cut short", "too long", "no body"],
)
async def test_what_came_of_an_answer_is_kept(
    raw: RawProvider, fault: Fault, received: bytes
) -> None:
    """What there is of an answer tells people more than that there was none."""
    raw.script = fault
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, InDoubt)
    assert reply.received == received


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["to itself", "elsewhere"])
async def test_a_redirect_is_not_followed(
    raw: RawProvider, status: int, *, elsewhere: bool
) -> None:
    """A redirect is an answer; nobody gets a second request for it."""
    async with RawProvider() as other, client(raw.url) as provider:
        target = (other if elsewhere else raw).url.encode()

        async def redirect(request: Received) -> None:
            await request.line.write(
                b"HTTP/1.1 %d Moved\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % (status, target)
            )

        raw.script = redirect
        reply = await send(provider)
        assert isinstance(reply, Answer)
        assert (reply.status, reply.body) == (status, b"")
        assert (len(raw.requests), len(other.lines)) == (1, 0)


async def test_an_answer_that_is_none_is_not_waited_for(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once an answer cannot be read any further, its connection is closed, by us."""
    read = asyncio.Event()

    def data_received(line: Line, data: bytes) -> None:
        original(line, data)
        read.set()

    original = Line.data_received
    monkeypatch.setattr(Line, "data_received", data_received)

    async def spoil(request: Received) -> None:
        await request.line.write(CHUNKED + b"3\r\nMSG\r\n")
        await read.wait()
        await request.line.write(b"5\r\n_OK:1\r\nzz\r\n")

    raw.script = spoil
    async with client(raw.url) as provider:
        reply = await send(provider)
        assert isinstance(reply, InDoubt)
        assert (reply.reason, reply.received) == ("answer is not HTTP", b"MSG_OK:1")
        await raw.all_closed()


async def hangs(request: Received) -> None:
    """Never answers."""


async def hangs_in_the_headers(request: Received) -> None:
    """Breaks off without closing."""
    await request.line.write(OK, b"Content-")


async def hangs_in_the_body(request: Received) -> None:
    """Breaks off without closing."""
    await request.line.write(SIZED, b"MSG_OK:")


async def hangs_in_a_body_without_length(request: Received) -> None:
    """Has said all there is, but does not close."""
    await request.line.write(OK, b"\r\nMSG_OK:1")


async def drips_for_ever(request: Received) -> None:
    """Is never quite silent: a header line that does not end."""
    await request.line.write(OK)
    while True:
        await request.line.write(b"x")
        await asyncio.sleep(0.01)


async def promises_for_ever(request: Received) -> None:
    """Is never quite silent: one interim answer after the other."""
    while True:
        await request.line.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "script",
    [
        hangs,
        hangs_in_the_headers,
        hangs_in_the_body,
        hangs_in_a_body_without_length,
        drips_for_ever,
        promises_for_ever,
    ],
)
async def test_an_answer_that_does_not_come_in_time_is_in_doubt(
    raw: RawProvider, script: Script
) -> None:
    """A hanging provider is waited for as long as the timeout, once, and hung up on."""
    raw.script = script
    async with client(raw.url, timeout=0.5) as provider:
        reply = await send(provider)
        assert isinstance(reply, InDoubt)
        assert reply.reason == "no answer in time"
        await raw.all_closed()
    assert len(raw.requests) == len(raw.lines) == 1


async def test_an_answer_that_waits_in_the_socket_beats_the_timeout(raw: RawProvider) -> None:
    """A process that was frozen past the timeout still takes the answer that came meanwhile."""

    async def answer_and_freeze(request: Received) -> None:
        request.line.write_now(SIZED + b"MSG_OK:1")
        time.sleep(1.0)  # noqa: ASYNC251 - the freeze

    raw.script = answer_and_freeze
    async with client(raw.url, timeout=0.5) as provider:
        reply = await send(provider)
    assert isinstance(reply, Answer)


async def test_no_fault_gives_away_a_number_or_a_text(
    raw: RawProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the reply nor a log at the lowest level, in debug mode, holds either."""
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    for fault, _ in FAULTS.values():
        raw.script = fault
        async with client(raw.url) as provider:
            said = repr(await send(provider)) + caplog.text
        assert "Your" in TEXT
        assert "Your" not in said
        assert NUMBER not in said
