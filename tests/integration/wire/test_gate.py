"""The last moment before the first byte: the wait, the check, the deadline, a cancellation."""

import asyncio
import gc

import aiohttp
import pytest

from dispatcher import provider as module
from dispatcher.connections import Connections
from dispatcher.line import Line
from dispatcher.provider import Answer, InDoubt, NeverLeft
from tests.integration.wire.client import client, send
from tests.integration.wire.raw_provider import RawProvider, Received, Script, well


async def test_a_message_whose_check_says_no_does_not_leave(raw: RawProvider) -> None:
    """A refused message is no request; its connection, idle for longer, is not kept."""
    async with client(raw.url) as provider:
        reply = await send(provider, check=lambda: "lease ran out")
        assert reply == NeverLeft("lease ran out", withheld=True)
        assert isinstance(await send(provider), Answer)
    assert (len(raw.requests), len(raw.lines), raw.rests) == (1, 2, [])


async def test_the_check_is_made_once_and_with_the_connection_in_hand(raw: RawProvider) -> None:
    """The check is the last thing before the write, so it is made when all else is ready."""
    calls = []

    def check() -> None:
        calls.append(len(raw.lines))

    async with client(raw.url) as provider:
        await send(provider)
        await send(provider, check=check)
    assert calls == [1]


async def test_a_lease_that_runs_out_during_the_wait_holds_the_message(raw: RawProvider) -> None:
    """What was allowed before the wait is asked again after it."""
    allowed = True

    async def wait() -> None:
        nonlocal allowed
        await asyncio.sleep(0)
        allowed = False

    async with client(raw.url) as provider:
        reply = await send(provider, check=lambda: None if allowed else "lease ran out", wait=wait)
    assert reply == NeverLeft("lease ran out", withheld=True)
    assert not raw.requests


async def test_a_paced_message_leaves_when_its_wait_ends(raw: RawProvider) -> None:
    """The wait is made with a connection in hand, and not a byte leaves before its end."""
    waiting, due = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await due.wait()

    async with client(raw.url) as provider, asyncio.TaskGroup() as group:
        task = group.create_task(send(provider, wait=wait))
        await waiting.wait()
        assert isinstance(await send(provider), Answer)
        assert len(raw.requests) == 1
        due.set()
        assert isinstance(await task, Answer)
    assert len(raw.requests) == len(raw.lines) == 2


async def test_the_wait_does_not_count_in_the_timeout(raw: RawProvider) -> None:
    """A wait longer than the timeout is not cut short; the timeout counts before and after it."""
    waited = False

    async def hang(request: Received) -> None:
        pass

    async def wait() -> None:
        nonlocal waited
        await asyncio.sleep(1.0)
        waited = True

    raw.script = hang
    async with client(raw.url, timeout=0.5) as provider:
        reply = await send(provider, wait=wait)
    assert waited
    assert isinstance(reply, InDoubt)
    assert reply.reason == "no answer in time"
    assert len(raw.requests) == 1


async def test_a_connection_lost_during_the_wait_is_replaced(raw: RawProvider) -> None:
    """The message waits again with another connection and leaves once."""
    waits = 0

    async def wait() -> None:
        nonlocal waits
        waits += 1
        if waits == 1:
            await raw.connected.wait()
            raw.lines[0].hang_up()
            await raw.all_closed()

    async with client(raw.url) as provider:
        reply = await send(provider, wait=wait)
    assert isinstance(reply, Answer)
    assert (waits, len(raw.requests), len(raw.lines)) == (2, 1, 2)


async def test_a_provider_that_only_hangs_up_is_tried_twice(raw: RawProvider) -> None:
    """When every connection is closed before it can be used, the message never left."""

    async def wait() -> None:
        await raw.connected.wait()
        raw.lines[-1].hang_up()
        await raw.all_closed()

    async with client(raw.url) as provider:
        reply = await send(provider, wait=wait)
    assert reply == NeverLeft("connection closed before the request")
    assert not raw.requests
    assert len(raw.lines) == 2


@pytest.mark.parametrize(
    "error", [TimeoutError("mine"), ConnectionResetError("mine"), aiohttp.ClientError("mine")]
)
async def test_what_the_wait_raises_is_the_callers(raw: RawProvider, error: Exception) -> None:
    """A failure of the caller's own is not taken for one of the connection."""

    async def wait() -> None:
        raise error

    async with client(raw.url) as provider:
        with pytest.raises(type(error), match="mine") as caught:
            await send(provider, wait=wait)
    assert caught.value is error
    assert not raw.requests


async def test_a_cancellation_comes_through_and_closes_the_connection(raw: RawProvider) -> None:
    """A cancelled request leaves no connection on which its answer could come later."""
    received = asyncio.Event()

    async def hang(request: Received) -> None:
        received.set()

    raw.script = hang
    async with client(raw.url) as provider:
        task = asyncio.create_task(send(provider))
        await received.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await raw.all_closed()
    assert len(raw.requests) == 1


async def test_a_cancellation_during_the_wait_comes_through(raw: RawProvider) -> None:
    """A paced message that is cancelled before it is due does not leave."""
    waiting = asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await asyncio.Event().wait()

    async with client(raw.url) as provider:
        task = asyncio.create_task(send(provider, wait=wait))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await raw.all_closed()
    assert not raw.requests


async def test_a_cancellation_is_not_lost_in_the_timeout(raw: RawProvider) -> None:
    """When the caller cancels in the same moment as the deadline, the caller wins."""
    received = asyncio.Event()

    async def hang(request: Received) -> None:
        received.set()

    raw.script = hang
    async with client(raw.url) as provider:
        task = asyncio.create_task(send(provider))
        await received.wait()
        (attempt,) = provider._watchdog._watched
        attempt.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_timeout_leaves_the_callers_task_uncancelled(raw: RawProvider) -> None:
    """The deadline ends the request alone: timeouts around it still work as they should."""

    async def hang(request: Received) -> None:
        pass

    raw.script = hang
    async with client(raw.url, timeout=0.2) as provider:
        await send(provider)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


def broken(*_: object) -> None:
    """A part with a bug."""
    raise RuntimeError("a bug")


async def test_any_error_after_the_write_is_in_doubt(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write decides, not the exception's class."""
    monkeypatch.setattr(Line, "ask", broken)
    async with client(raw.url) as provider:
        reply = await send(provider)
    assert isinstance(reply, InDoubt)
    assert reply.reason == "unexpected RuntimeError"


async def test_an_answer_outlives_what_ails_its_connection(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was received counts, though the connection cannot be kept; it is closed."""
    monkeypatch.setattr(Connections, "give_back", broken)
    async with client(raw.url) as provider:
        assert isinstance(await send(provider), Answer)
        await raw.all_closed()


async def test_a_message_waits_anew_after_what_was_to_be_read(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes time, so a paced message is due again before it leaves; once."""
    looks = iter([False, False, True, True])
    monkeypatch.setattr(Line, "ready", property(lambda _: next(looks)))
    waits = 0

    async def wait() -> None:
        nonlocal waits
        waits += 1

    async with client(raw.url) as provider:
        assert isinstance(await send(provider, wait=wait), Answer)
    assert (waits, len(raw.requests), len(raw.lines)) == (2, 1, 1)


async def test_a_bug_before_the_write_is_raised(raw: RawProvider) -> None:
    """Nothing has left, so nothing is in doubt, and the bug is seen."""

    def check() -> None:
        raise LookupError("a bug")

    async with client(raw.url) as provider:
        with pytest.raises(LookupError, match="a bug"):
            await send(provider, check=check)
    assert not raw.requests


async def test_a_client_that_is_closed_sends_nothing(raw: RawProvider) -> None:
    """Use after the end is a bug of the caller's."""
    async with client(raw.url) as provider:
        await send(provider)
    with pytest.raises(RuntimeError, match="closed"):
        await send(provider)
    assert len(raw.requests) == 1


async def test_an_answer_at_the_last_moment_counts(
    raw: RawProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the deadline passes in the turn in which the answer is read, the answer wins."""

    def set_and_overdue(line: Line, data: bytes) -> None:
        data_received(line, data)
        for attempt in list(provider._watchdog._watched):
            attempt.cancel()

    data_received = Line.data_received
    monkeypatch.setattr(Line, "data_received", set_and_overdue)
    async with client(raw.url) as provider:
        assert isinstance(await send(provider), Answer)


def attempts_held() -> int:
    """How many messages' attempts are in memory."""
    return sum(isinstance(held, module._Attempt) for held in gc.get_objects())


async def cut(request: Received) -> None:
    """Breaks off within the answer."""
    await request.line.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nMSG_")
    request.line.hang_up()


async def nonsense(request: Received) -> None:
    """Does not speak HTTP."""
    await request.line.write(b"MSG_OK\r\n\r\n")


@pytest.mark.parametrize("script", [well, cut, nonsense])
async def test_no_message_is_kept_after_its_reply(raw: RawProvider, script: Script) -> None:
    """Nothing of a message stays in memory, not even until garbage is collected."""
    raw.script = script
    gc.collect()
    before = attempts_held()
    gc.disable()
    try:
        async with client(raw.url) as provider:
            for _ in range(50):
                await send(provider)
            await asyncio.sleep(0)  # the turn itself holds on to what it has run
            assert attempts_held() <= before
    finally:
        gc.enable()
