"""The only HTTP client: one GET to the provider for one message, once on the wire or not at all.

The provider has no idempotency key, so a second GET is a second SMS. What counts is therefore
not which exception came but whether the first byte may have left. It can leave in one place,
`_Attempt._write`, which marks the attempt first: before the mark every failure is `NeverLeft`,
after it everything short of a whole answer is `InDoubt`.

aiohttp opens the connection and parses the answer. Its session, which would do both, is not used:
it repeats a GET by itself when a connection closes under it, follows redirects, and took two
fifths of the client's time, measured.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeAlias, cast
from urllib.parse import quote

import aiohttp
from yarl import URL

from dispatcher.connections import Connections
from dispatcher.line import Line, NoAnswer, Whole

TURNS: Final = 5
"""Turns of the event loop in which it has read what lay in a socket, which may be TLS's own."""

Check: TypeAlias = Callable[[], str | None]
"""Asked at the last moment: None to send, or why not, in one plain phrase."""

Wait: TypeAlias = Callable[[], Awaitable[None]]
"""Waits, connection in hand, until a paced message is due."""


class Answer(NamedTuple):
    """A whole HTTP answer, of whatever status; the body's bytes are as received."""

    status: int
    body: bytes
    seconds: float
    """From the write of the request to the end of the answer."""


@dataclass(frozen=True, slots=True)
class NeverLeft:
    """Certainly not one byte of the request has left."""

    reason: str
    """A short plain phrase, without number or text."""
    withheld: bool = False
    """True if the caller's own check said no."""


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The request may have reached the provider, and no whole answer came."""

    reason: str
    """A short plain phrase, without number or text."""
    seconds: float
    """From the write of the request to the failure."""
    received: bytes = b""
    """What had come of the body by then; it is for people, and must not be taken for an answer."""


Reply: TypeAlias = Answer | NeverLeft | InDoubt


class Provider:
    """Sends messages to the provider over kept connections; an async context manager.

    Args:
        url: The provider's address; parameters are appended to a query it may have.
        timeout: Seconds for one request, from the first step of connecting to the answer's end;
            `wait` is not counted. Kept to within a fiftieth.
        keepalive: Seconds an idle connection is kept.
        concurrency: Connections at most; a further request waits for one, within its timeout.

    Raises:
        ValueError: The address is not one of HTTP.
    """

    _connections: Connections

    def __init__(self, url: str, *, timeout: float, keepalive: float, concurrency: int) -> None:
        base = _address(url)
        if base is None:
            raise ValueError("the provider's address must be http:// or https:// and a host")
        # All that is sent beside the parameters; no Accept-Encoding, as an answer is read as it
        # comes. aiohttp is told the bare address, so that none of its errors, caches and logs can
        # hold a number or a text.
        self._before = f"GET {base.raw_path}?" + (
            base.raw_query_string and f"{base.raw_query_string}&"
        )
        self._after = (
            f" HTTP/1.1\r\nHost: {base.host_port_subcomponent}\r\nUser-Agent: dispatcher\r\n"
        )
        if base.user is not None or base.password is not None:
            secret = aiohttp.encode_basic_auth(base.user or "", base.password or "")
            self._after += f"Authorization: {secret}\r\n"
        self._base = base.with_query(None).with_user(None)
        self._keepalive = keepalive
        self._concurrency = concurrency
        self._watchdog = _Watchdog(timeout)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._connections = Connections(
            self._base, limit=self._concurrency, keepalive=self._keepalive
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog.close()
        await self._connections.close()

    async def send(
        self,
        *,
        user_id: int,
        service_id: int,
        msisdn: str,
        text: str,
        extended: bool,
        check: Check,
        wait: Wait | None = None,
    ) -> Reply:
        """Send one message, once.

        With a connection in hand `wait` is awaited, then `check` is called; if that returns
        None the request is written at once, with no await between. Should the connection turn
        out after the wait to be closed, or to have something to read first, `wait` is awaited
        once more before the next try.

        Args:
            user_id: The customer's number.
            service_id: The provider's number of the service.
            msisdn: The recipient, digits only.
            text: The message.
            extended: Ask for an identifier in the answer and for delivery reports.
            check: Whether the message may still leave.
            wait: For a paced message.

        Raises:
            ValueError: The number or the text cannot be written as UTF-8.
            RuntimeError: The client is closed.
            asyncio.CancelledError: The caller cancelled, and the connection is closed; the
                request had left if `check` had returned None. Or the client was closed while the
                message waited for a connection.
        """
        if self._connections.closed:
            raise RuntimeError("the client is closed")
        # Percent-encoding is what Python does slowest here, and digits need none.
        number = msisdn if msisdn.isascii() and msisdn.isdigit() else _encoded(msisdn)
        content = _encoded(text)
        more = "&extended=yes" if extended else ""
        request = (
            f"{self._before}user_id={user_id:d}&service_id={service_id:d}"
            f"&msisdn={number}&text={content}{more}{self._after}\r\n"
        )
        attempt = _Attempt(
            request.encode("ascii"), self._connections, check, wait, self._watchdog, self._loop
        )
        try:
            with attempt:
                return await attempt.exchange()
        except _WithheldError as refusal:
            return NeverLeft(str(refusal), withheld=True)
        except _WaitError as failure:
            raise failure.error from None
        except (NoAnswer, aiohttp.ClientError, OSError) as error:
            reason = _reason(error)
        except Exception as error:
            if attempt.left_at is None:
                raise
            reason = f"unexpected {type(error).__name__}"
        if attempt.left_at is None:
            return NeverLeft(reason)
        return InDoubt(reason, attempt.seconds(), attempt.received)


class _WithheldError(Exception):
    """The caller's check said no."""


class _WaitError(Exception):
    """Carries what the caller's wait raised past what the connection may raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class _Attempt:
    """One message's request and answer, with the mark and the deadline."""

    __slots__ = (
        "_answer",
        "_cancelling",
        "_check",
        "_connections",
        "_loop",
        "_request",
        "_task",
        "_wait",
        "_watchdog",
        "deadline",
        "left_at",
        "overdue",
        "received",
    )

    def __init__(
        self,
        request: bytes,
        connections: Connections,
        check: Check,
        wait: Wait | None,
        watchdog: _Watchdog,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._request = request
        self._connections = connections
        self._check = check
        self._wait = wait
        self._watchdog = watchdog
        self._loop = loop
        self._answer: asyncio.Future[Whole] | None = None
        self.left_at: float | None = None
        self.received = b""
        self.deadline = 0.0
        self.overdue = False

    def __enter__(self) -> None:
        # Within a coroutine there is always a task.
        self._task = cast("asyncio.Task[object]", asyncio.current_task(self._loop))
        self._cancelling = self._task.cancelling()
        self._watchdog.add(self, self._loop)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog.remove(self)
        # As in asyncio.timeout: a cancellation is ours only if nobody else cancelled too.
        if (
            self.overdue
            and self._task.uncancel() <= self._cancelling
            and isinstance(error, asyncio.CancelledError)
        ):
            raise NoAnswer(
                "connect timeout" if self.left_at is None else "no answer in time"
            ) from None

    async def exchange(self) -> Answer:
        """Send the request, and read the answer to its end."""
        line, self._answer = await self._leave()
        try:
            status, body = await self._answer
        except BaseException:
            self.received = line.received
            line.close()
            raise
        finally:
            # A failure in it leads to this attempt, with number and text.
            self._answer = None
        answer = Answer(status, body, self.seconds())
        try:
            self._connections.give_back(line)
        except Exception:  # noqa: BLE001 - whatever ails the connection, the answer is there
            line.close()
        return answer

    async def _leave(self) -> tuple[Line, asyncio.Future[Whole]]:
        """Write the request to a connection that can take it."""
        for _ in range(2):
            line = self._connections.take() or await self._connections.open()
            try:
                if self._wait is not None:
                    await self._due(self._wait)
                answer = self._write(line)
                if answer is None and await _read_out(line):
                    if self._wait is not None:
                        await self._due(self._wait)
                    answer = self._write(line)
            except BaseException:
                # Also where the message is withheld: to keep it would begin its idle time anew.
                line.close()
                raise
            if answer is not None:
                return line, answer
            line.close()
        raise NoAnswer("connection closed before the request")

    def _write(self, line: Line) -> asyncio.Future[Whole] | None:
        """Write the request if it may leave; None if the connection cannot take it any more."""
        if not line.ready:
            return None
        refusal = self._check()
        if refusal is not None:
            raise _WithheldError(refusal)
        self.left_at = time.monotonic()
        return line.ask(self._request)

    async def _due(self, wait: Wait) -> None:
        """Wait until the message is due; the deadline stands still meanwhile."""
        left = self._watchdog.pause(self, self._loop)
        try:
            await wait()
        except (aiohttp.ClientError, OSError) as error:
            raise _WaitError(error) from None
        self._watchdog.resume(self, left, self._loop)

    def cancel(self) -> None:
        if self._answer is not None and self._answer.done():
            return  # it came at the last moment, and the task is about to take it
        self.overdue = True
        self._task.cancel()

    def seconds(self) -> float:
        """Time since the write; the loop's clock stands still between two turns of uvloop."""
        return 0.0 if self.left_at is None else time.monotonic() - self.left_at


async def _read_out(line: Line) -> bool:
    """Let the event loop read what lies in the socket; tells whether a request may go then."""
    for _ in range(TURNS):
        if not line.usable:
            return False
        await asyncio.sleep(0)
        if line.ready:
            return True
    return False


class _Watchdog:
    """Cancels what is overdue, as `asyncio.timeout` does, with one timer for all requests.

    A timer for each request took a seventh of the client's time, measured under uvloop.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._every = seconds / 100
        self._watched: set[_Attempt] = set()
        self._overdue: set[_Attempt] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, attempt: _Attempt, loop: asyncio.AbstractEventLoop) -> None:
        self.resume(attempt, self._seconds, loop)

    def remove(self, attempt: _Attempt) -> None:
        self._watched.discard(attempt)

    def pause(self, attempt: _Attempt, loop: asyncio.AbstractEventLoop) -> float:
        """Stop watching; returns the seconds that were left."""
        self._watched.discard(attempt)
        return attempt.deadline - loop.time()

    def resume(self, attempt: _Attempt, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        attempt.deadline = loop.time() + seconds
        self._watched.add(attempt)
        if self._timer is None:
            self._timer = loop.call_later(self._every, self._look, loop)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        overdue = {attempt for attempt in self._watched if attempt.deadline <= now}
        # Only what was overdue at the last look too: timers run before sockets are read, and
        # after a freeze of this process the answers lie in the sockets.
        for attempt in overdue & self._overdue:
            self._watched.discard(attempt)
            attempt.cancel()
        self._overdue = overdue
        self._timer = loop.call_later(self._every, self._look, loop) if self._watched else None


def _address(url: str) -> URL | None:
    """The provider's address without a fragment, or None if none can be reached by it."""
    try:
        address = URL(url).with_fragment(None)
        # What a name lookup begins with; it would raise there, for every message.
        host = (address.raw_host or "").encode("idna")
    except ValueError:
        return None
    usable = host and address.scheme in {"http", "https"} and ":" not in (address.user or "")
    return address if usable else None


_ENCODED: Final = [quote(bytes([byte]), safe="") for byte in range(256)]


def _encoded(value: str) -> str:
    """Percent-encode all but letters, digits and `-._~`; no character of a text has a meaning."""
    try:
        return "".join(map(_ENCODED.__getitem__, value.encode()))
    except UnicodeEncodeError:
        pass  # its message, and its very object, hold the text
    raise ValueError("a number or a text has a character that cannot be written as UTF-8")


_REASONS: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "connection reset",
    errno.EPIPE: "connection reset",
    errno.ETIMEDOUT: "connection timed out",
    errno.EHOSTUNREACH: "host unreachable",
    errno.ENETUNREACH: "network unreachable",
    errno.EADDRNOTAVAIL: "no free local port",
    errno.EMFILE: "too many open files",
}


def _reason(error: BaseException) -> str:
    """Why, in our own words: aiohttp's hold addresses, and a provider's could hold anything."""
    match error:
        case NoAnswer():
            return str(error)
        case aiohttp.ClientConnectorDNSError():
            return "name lookup failed"
        case aiohttp.ClientSSLError():
            return "TLS handshake failed"
        case OSError():
            return _REASONS.get(error.errno or 0, "connection failed")
        case _:
            return "connection failed"
