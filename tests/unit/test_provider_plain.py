"""The provider client's plain cases: answers, addresses, and what its failures say.

aioresponses stands in for the connection, before the write, so that here a failure has never
left; what happens after the write is for the wire tests.
"""

import asyncio
import errno
import logging
import socket
import ssl
import traceback
from collections.abc import Iterator
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from aioresponses import aioresponses
from aioresponses.compat import normalize_url
from yarl import URL

from dispatcher import provider as module
from dispatcher.line import MAX_ANSWER, Whole
from dispatcher.provider import Answer, InDoubt, NeverLeft, Provider, Reply, _reason

ADDRESS = "http://provider.example/send.php"
NUMBER = "359881234567"
TEXT = "Your code is 4711"
ASKED = URL(ADDRESS).with_query(user_id=7, service_id=42, msisdn=NUMBER, text=TEXT, extended="yes")
"""What one GET asks for."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Answers in place of the network."""
    with aioresponses() as web:

        async def leave(attempt: module._Attempt) -> tuple[object, asyncio.Future[Whole]]:
            method, target, _ = attempt._request.decode().split(" ", 2)
            asked = URL(ADDRESS).join(URL(target, encoded=True))
            answer = await web.match(method, normalize_url(asked), allow_redirects=False)
            assert answer is not None, f"nobody was to be asked for {asked}"
            came = asyncio.get_running_loop().create_future()
            came.set_result(Whole(answer.status, await answer.read()))
            return Mock(), came

        monkeypatch.setattr(module._Attempt, "_leave", leave)
        yield web


async def send(address: str = ADDRESS, number: str = NUMBER, text: str = TEXT) -> Reply:
    """Send one message through a client of its own."""
    async with Provider(address, timeout=5, keepalive=2, concurrency=1) as provider:
        return await provider.send(
            user_id=7,
            service_id=42,
            msisdn=number,
            text=text,
            extended=True,
            check=lambda: None,
        )


@pytest.mark.parametrize(
    "body",
    [
        b"MSG_OK",
        b"MSG_OK: 123\r\n",
        b"BAN_IP_TEMP",
        b"",
        b"\x00\xff",
        "Готово".encode(),
        b"x" * MAX_ANSWER,
    ],
)
async def test_an_answer_is_status_and_bytes(web: aioresponses, body: bytes) -> None:
    """The body is handed on as it came, byte by byte."""
    web.get(ASKED, body=body)
    reply = await send()
    assert isinstance(reply, Answer)
    assert (reply.status, reply.body) == (200, body)


@pytest.mark.parametrize("status", [201, 204, 301, 302, 400, 403, 404, 429, 500, 502, 503])
async def test_every_status_is_an_answer(web: aioresponses, status: int) -> None:
    """No status is an error here, and none is followed."""
    web.get(ASKED, status=status, body=b"MSG_OK", headers={"Location": ADDRESS})
    reply = await send()
    assert isinstance(reply, Answer)
    assert (reply.status, reply.body) == (status, b"MSG_OK")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "provider.example/send.php",
        "//provider.example/",
        "/send.php",
        "ftp://provider.example/",
        "file:///etc/passwd",
        "http://",
        "http:///send.php",
        "http://provider.example:99999/",
        "http://[::1/",
        "http://provider..example/",
        f"http://{'x' * 64}.example/",
    ],
)
def test_an_address_that_is_not_one_of_http_is_refused(address: str) -> None:
    """A wrong address stops the start in plain words, not every message later."""
    with pytest.raises(ValueError, match=r"^the provider's address must be http:// or https://"):
        Provider(address, timeout=5, keepalive=2, concurrency=1)


@pytest.mark.parametrize(("number", "text"), [(NUMBER, f"{TEXT} \ud83d"), ("3598\udcff", TEXT)])
async def test_what_has_no_utf8_is_refused_without_quoting_it(number: str, text: str) -> None:
    """Half a surrogate pair cannot be sent; the error and all it holds on to keep the text."""
    with pytest.raises(ValueError, match="cannot be written as UTF-8") as caught:
        await send(number=number, text=text)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert TEXT not in "".join(traceback.format_exception(caught.value))


async def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Not even at the lowest level and in debug mode is a number or a text written down."""
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        reply = await send(f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert reply == NeverLeft("connection refused")
    assert NUMBER not in caplog.text
    assert "Your" not in caplog.text


KEY = ConnectionKey("provider.example", 80, False, True, None, None, None)  # noqa: FBT003


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            aiohttp.ClientConnectorDNSError(KEY, socket.gaierror(socket.EAI_NONAME, ADDRESS)),
            "name lookup failed",
        ),
        (
            aiohttp.ClientConnectorError(KEY, OSError(errno.ECONNREFUSED, ADDRESS)),
            "connection refused",
        ),
        (
            aiohttp.ClientConnectorError(KEY, OSError(errno.EHOSTUNREACH, ADDRESS)),
            "host unreachable",
        ),
        (
            aiohttp.ClientConnectorError(KEY, OSError(errno.ENETUNREACH, ADDRESS)),
            "network unreachable",
        ),
        (
            aiohttp.ClientConnectorError(KEY, OSError(errno.ETIMEDOUT, ADDRESS)),
            "connection timed out",
        ),
        (
            aiohttp.ClientConnectorError(KEY, OSError(errno.EMFILE, ADDRESS)),
            "too many open files",
        ),
        (
            aiohttp.ClientConnectorError(KEY, OSError(errno.EADDRNOTAVAIL, ADDRESS)),
            "no free local port",
        ),
        (aiohttp.ClientConnectorError(KEY, OSError(ADDRESS)), "connection failed"),
        (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, ADDRESS)), "TLS handshake failed"),
        (
            aiohttp.ClientConnectorCertificateError(KEY, ssl.CertificateError(1, ADDRESS)),
            "TLS handshake failed",
        ),
        (aiohttp.ClientOSError(errno.ECONNRESET, ADDRESS), "connection reset"),
        (aiohttp.ClientOSError(errno.EPIPE, ADDRESS), "connection reset"),
        (aiohttp.ClientConnectionResetError(ADDRESS), "connection failed"),
        (aiohttp.ServerDisconnectedError(ADDRESS), "connection failed"),
        (aiohttp.InvalidURL(ADDRESS), "connection failed"),
        (aiohttp.ConnectionTimeoutError(ADDRESS), "connection failed"),
        (TimeoutError(ADDRESS), "connection failed"),
        (ConnectionAbortedError(errno.ECONNABORTED, ADDRESS), "connection failed"),
    ],
)
async def test_a_failure_is_told_in_our_own_words(
    web: aioresponses, error: Exception, reason: str
) -> None:
    """aiohttp's own words hold addresses; ours say what to look into."""
    assert _reason(error) == reason
    web.get(ASKED, exception=error)
    assert await send() == NeverLeft(reason)


def test_replies_compare_by_value() -> None:
    """Replies are plain values: equal when they say the same, hashable, unchangeable."""
    assert len({Answer(200, b"MSG_OK", 0.5), Answer(200, b"MSG_OK", 0.5)}) == 1
    assert NeverLeft("connection refused") != NeverLeft("connection refused", withheld=True)
    with pytest.raises(AttributeError):
        setattr(InDoubt("no answer in time", 15.0), "reason", "")  # noqa: B010 - mypy knows it
