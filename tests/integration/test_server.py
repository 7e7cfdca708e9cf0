from __future__ import annotations

import asyncio
import ipaddress
import json
import resource
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from dispatcher import server as serverside
from dispatcher import settings
from dispatcher.metrics import Metrics
from dispatcher.server import CannotListen, Server
from tests.serving import TOKEN, Serving, serving, until

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

LIMIT = 16 * 1024
REPORT = {"sms_id": "a", "status": "DELIVRD"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json; charset=utf-8"}


@pytest.fixture
async def it(database: str) -> AsyncIterator[Serving]:
    """A server with the usual settings."""
    async with serving(database) as it:
        yield it


async def kept(connection: Connection) -> list[dict[str, Any]]:
    """The parameters of all stored reports."""
    rows = await connection.fetch("SELECT params FROM delivery_report ORDER BY id")
    return [json.loads(row["params"]) for row in rows]


# ------------------------------------------------------------------------------------- health


async def test_health_is_told_while_the_process_lives(it: Serving) -> None:
    """A worker that is not ready is healthy all the same."""
    it.unready = "the database is away"
    assert await it.get("/healthz") == (200, '{"status":"ok"}')


async def test_readiness_is_told_with_the_reason_against_it(it: Serving) -> None:
    """Ready is 200; anything else is 503 and says why."""
    assert await it.get("/readyz") == (200, '{"status":"ok"}')
    it.unready = "the worker's loop stands still"
    status, body = await it.get("/readyz")
    assert (status, json.loads(body)["reason"]) == (503, "the worker's loop stands still")


async def test_health_answers_head_and_refuses_to_be_posted_to(it: Serving) -> None:
    """HEAD is answered as GET is, without a body; other methods are not allowed."""
    async with it.client.head(it.url("/healthz")) as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with it.client.post(it.url("/metrics")) as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


async def test_nothing_else_is_there(it: Serving) -> None:
    """Other paths are not found, and no answer tells a version."""
    for path in ("/", "/dlr", "/healthz/", "/dlr2/x", "/%2e%2e"):
        async with it.client.get(it.url(path)) as answer:
            assert (answer.status, answer.headers["Server"]) == (404, "dispatcher")


# ------------------------------------------------------------------------------------- listening


async def test_the_port_taken_is_told(it: Serving) -> None:
    """A free port is chosen by the system and told in the log."""
    (line,) = it.told("http.listening")
    assert (line["host"], line["port"]) == ("127.0.0.1", it.server.port)


async def test_a_port_that_is_taken_stops_the_start(database: str) -> None:
    """One sentence names the setting; nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = rf"^DISPATCHER_HTTP_PORT is wrong: port {port} .*\.$"
        with pytest.raises(CannotListen, match=sentence):
            await _enter(database, http_port=port)


async def test_an_address_of_nobody_stops_the_start(database: str) -> None:
    """An address that this machine has not is told with its setting."""
    with pytest.raises(CannotListen, match=r"^DISPATCHER_HTTP_HOST .* 192\.0\.2\.1 .*\.$"):
        await _enter(database, http_host="192.0.2.1", http_port=0)


async def _enter(database: str, **given: Any) -> None:
    server = Server(settings.load(**given), dsn=database, metrics=Metrics(), unready=lambda: None)
    async with server:
        raise AssertionError("it listens")


async def test_the_server_makes_room_for_its_connections(database: str) -> None:
    """A process that may open few files lets itself open more, as far as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        async with serving(database):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, serverside.FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ------------------------------------------------------------------------------------- reports


async def test_a_report_may_come_by_get(it: Serving, connection: Connection) -> None:
    """The parameters of the query are stored before OK is answered."""
    assert await it.get(f"/dlr/{TOKEN}", **REPORT, extra="1") == (200, "OK")
    assert await kept(connection) == [REPORT | {"extra": "1"}]


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (FORM, "sms_id=a&status=DELIVRD"),
        ({}, "sms_id=a&status=DELIVRD"),
        (JSON, '{"sms_id": "a", "status": "DELIVRD"}'),
        ({"Content-Type": "application/vnd.x+json"}, '{"sms_id": "a", "status": "DELIVRD"}'),
    ],
)
async def test_a_report_may_come_by_post(
    it: Serving, connection: Connection, headers: dict[str, str], body: str
) -> None:
    """A form and a JSON object do as well as a query."""
    async with it.client.post(
        it.url(f"/dlr/{TOKEN}"), data=body.encode(), headers=headers
    ) as answer:
        assert (answer.status, await answer.text()) == (200, "OK")
    assert await kept(connection) == [REPORT]


async def test_a_body_adds_to_the_query(it: Serving, connection: Connection) -> None:
    """Both are kept, and what the body says counts."""
    url = it.url(f"/dlr/{TOKEN}?status=ENROUTE&from=x")
    async with it.client.post(url, data=REPORT) as answer:
        assert answer.status == 200
    (params,) = await kept(connection)
    assert params == {"sms_id": "a", "status": ["ENROUTE", "DELIVRD"], "from": "x"}
    assert await connection.fetchval("SELECT status FROM delivery_report") == "delivered"


async def test_names_and_words_are_set(database: str, connection: Connection) -> None:
    """The provider's own parameter names and words are understood when they are set."""
    words = '{"2": "delivered"}'
    async with serving(
        database, dlr_id_param="Id", dlr_status_param="stat", dlr_status_map=words
    ) as it:
        assert await it.get(f"/dlr/{TOKEN}", Id="a", stat="2") == (200, "OK")
        assert (await it.get(f"/dlr/{TOKEN}", **REPORT))[0] == 400
    row = await connection.fetchrow("SELECT provider_id, status FROM delivery_report")
    assert row is not None
    assert tuple(row) == ("a", "delivered")


async def test_an_unknown_word_is_stored_without_a_status(
    it: Serving, connection: Connection
) -> None:
    """A word that nobody knows is no reason to lose a report."""
    assert await it.report("a", "BLOCKED") == 200
    assert await connection.fetchval("SELECT status IS NULL FROM delivery_report")
    (line,) = it.told("report.received")
    assert (line["status"], line["word"]) == (None, "BLOCKED")


@pytest.mark.parametrize(
    "query",
    [
        b"sms_id=%00a%00&status=%00",
        b"sms_id=%ff%fe&status=%ED%A0%80",
        b"sms_id='); DROP TABLE outbox; --&status=$1",
        b"sms_id=%F0%9F%92%A9&status=%E2%80%AE",
        b"sms_id=" + b"x" * 200 + b"&status=" + b"y" * 5000,
    ],
)
async def test_a_hostile_report_is_stored_like_any_other(
    it: Serving, connection: Connection, query: bytes
) -> None:
    """Neither NUL nor broken UTF-8 nor anything else makes a report fail."""
    request = b"GET /dlr/%b?%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answered = await it.exchange(request % (TOKEN.encode(), query.replace(b" ", b"+")))
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(await kept(connection)) == 1


async def test_a_proxy_may_name_the_whole_address(it: Serving) -> None:
    """A request in absolute form is understood, as HTTP asks of a server."""
    path = f"http://example.org/dlr/{TOKEN}?sms_id=a&status=SENT"
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert (await it.exchange(request.encode())).startswith(b"HTTP/1.1 200 ")


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "token",
    ["", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), TOKEN + "/", "%D1%82", "%ff", "%00"],
)
async def test_a_wrong_token_is_not_found(it: Serving, connection: Connection, token: str) -> None:
    """A token that is not ours leads to nothing, and nothing is stored."""
    request = f"GET /dlr/{token}?sms_id=a&status=SENT HTTP/1.0\r\n\r\n"
    assert (await it.exchange(request.encode())).startswith(b"HTTP/1.0 404 ")
    assert await kept(connection) == []


async def test_a_token_may_have_any_characters(database: str) -> None:
    """A token is compared as it is meant, however it is written in the address."""
    async with serving(database, dlr_token="таен/ключ?") as it:
        word = "%D0%BA%d0%bb%D1%8E%D1%87"
        for path in (
            f"%D1%82%D0%B0%D0%B5%D0%BD/{word}%3f",
            f"%D1%82%D0%B0%D0%B5%D0%BD%2F{word}%3F",
        ):
            request = f"GET /dlr/{path}?sms_id=a&status=SENT HTTP/1.0\r\n\r\n".encode()
            assert (await it.exchange(request)).startswith(b"HTTP/1.0 200 ")


async def test_without_a_token_there_is_no_endpoint(database: str, connection: Connection) -> None:
    """With no token set nobody can report, not even with an empty one."""
    async with serving(database, dlr_token=None) as it:
        for token in ("", "None", TOKEN):
            assert (await it.get(f"/dlr/{token}", **REPORT))[0] == 404
    assert await kept(connection) == []


async def test_only_allowed_addresses_may_report(database: str, connection: Connection) -> None:
    """The address that counts is the connection's own, whatever headers say of another."""
    async with serving(database, dlr_allow="10.0.0.0/8, 192.0.2.7") as it:
        headers = {"X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1"}
        url = it.url(f"/dlr/{TOKEN}")
        async with it.client.get(url, params=REPORT, headers=headers) as answer:
            assert answer.status == 403
        assert (await it.get("/dlr/wrong", **REPORT))[0] == 404
    assert await kept(connection) == []
    async with serving(database, dlr_allow="10.0.0.0/8,127.0.0.0/8") as it:
        assert await it.report("a") == 200


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("::ffff:11.1.2.3", False),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("fe80::1%eth0", True),
        ("11.1.2.3", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_an_address_is_looked_up_in_the_networks(address: str, inside: bool) -> None:  # noqa: FBT001
    """IPv4, IPv6 and IPv4 that is mapped into IPv6 are all understood."""
    networks = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "2001:db8::/32", "fe80::/10")))
    assert serverside._within(address, networks) is inside


@pytest.mark.parametrize(
    "query",
    [
        "",
        "sms_id=a",
        "status=DELIVRD",
        "sms_id=&status=DELIVRD",
        "sms_id=a&status=",
        "sms_id=+%09&status=DELIVRD",
        "SMS_ID=a&status=DELIVRD",
        "sms_id=" + "x" * 201 + "&status=DELIVRD",
    ],
)
async def test_a_report_without_its_parameters_is_refused(
    it: Serving, connection: Connection, query: str
) -> None:
    """The identifier and the word must both be there; the answer names them."""
    async with it.client.get(it.url(f"/dlr/{TOKEN}?{query}")) as answer:
        assert answer.status == 400
        assert "sms_id and status" in await answer.text()
    assert await kept(connection) == []


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (JSON, b"{"),
        (JSON, b"[1]"),
        (JSON, b"[" * 10_000),
        (FORM, b"a=1&" * 101),
    ],
)
async def test_a_body_that_says_nothing_is_refused(
    it: Serving, headers: dict[str, str], body: bytes
) -> None:
    """A body that cannot be read is the sender's fault, not ours."""
    async with it.client.post(it.url(f"/dlr/{TOKEN}"), data=body, headers=headers) as answer:
        assert answer.status == 400


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /dlr/%b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"nonsense\r\n\r\n",
        b"GET /dlr/%b HTTP/1.1\r\nbroken header\r\n\r\n",
        b"GET /dlr/%b?sms_id=\xff&status=SENT HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
async def test_what_is_no_http_is_refused(it: Serving, request_: bytes) -> None:
    """Broken requests get 400 and leave no word of theirs in the log."""
    answered = await it.exchange(request_.replace(b"%b", TOKEN.encode()))
    assert b" 400 " in answered.partition(b"\r\n")[0]
    assert not it.told("http.failed")


async def test_another_method_is_not_allowed(it: Serving) -> None:
    """Only GET and POST report, and only those who have the token learn that."""
    async with it.client.put(it.url(f"/dlr/{TOKEN}"), data=REPORT) as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, POST")
    async with it.client.put(it.url("/dlr/wrong"), data=REPORT) as answer:
        assert answer.status == 404


async def _padded(size: int) -> str:
    start = "sms_id=a&status=DELIVRD&pad="
    return start + "x" * (size - len(start))


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413), (60_000, 413)])
@pytest.mark.parametrize("way", ["query", "body", "chunks"])
async def test_more_than_sixteen_kibibytes_are_refused(
    it: Serving, connection: Connection, way: str, size: int, status: int
) -> None:
    """A query or a body may have 16 KiB and not a byte more, whether it tells its length or not."""
    padded = (await _padded(size)).encode()
    if way == "query":
        request = b"GET /dlr/%b?%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    elif way == "body":
        request = (
            b"POST /dlr/%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
            + str(size).encode()
            + b"\r\n\r\n%b"
        )
    else:
        request = (
            b"POST /dlr/%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + f"{size:x}".encode() + b"\r\n%b\r\n0\r\n\r\n"
        )
    answered = await it.exchange(request % (TOKEN.encode(), padded))
    assert answered.startswith(f"HTTP/1.1 {status} ".encode())
    assert len(await kept(connection)) == (status == 200)


# ------------------------------------------------------------------------------------- slow clients


async def test_a_head_that_does_not_come_is_not_waited_for(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that brings no whole head in time is closed, from the first byte or later."""
    monkeypatch.setattr(serverside, "IDLE", 0.3)
    async with serving(database) as it:
        assert await it.exchange(b"") == b""
        assert await it.exchange(b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: ") == b""
        answered = await it.exchange(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he")
        assert answered.startswith(b"HTTP/1.1 200 OK")


async def test_a_body_that_does_not_come_is_not_waited_for(
    it: Serving, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that drips longer than it may is refused, and the connection ends."""
    monkeypatch.setattr(serverside, "BODY", 0.1)
    head = f"POST /dlr/{TOKEN} HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\nsms_id=a"
    assert (await it.exchange(head.encode())).startswith(b"HTTP/1.1 408 ")
    assert await kept(connection) == []


async def test_a_client_that_leaves_leaves_nothing_behind(
    it: Serving, connection: Connection
) -> None:
    """A connection that breaks inside a body is neither a report nor a failure of ours."""
    _, writer = await it.raw()
    writer.write(
        f"POST /dlr/{TOKEN} HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\nsms_id=a".encode()
    )
    await until(lambda: _connections(it) == 1)
    writer.transport.abort()
    await until(lambda: _connections(it) == 0)
    assert await kept(connection) == []
    assert not it.told("http.failed")


def _connections(it: Serving) -> int:
    assert it.server._runner is not None
    assert it.server._runner.server is not None
    return len(it.server._runner.server.connections)


async def test_connections_are_bounded(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection too many is closed at once, and those before it are served."""
    monkeypatch.setattr(serverside, "CONNECTIONS", 2)
    async with serving(database) as it:
        first, second = await it.raw(), await it.raw()
        await until(lambda: _connections(it) == 2)
        reader, writer = await it.raw()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        for reader, writer in (first, second):
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.0 200 ")
            writer.close()


async def test_a_client_that_asks_first_is_told_to_go_on(it: Serving) -> None:
    """A body that waits for '100 Continue' gets it, and is stored."""
    reader, writer = await it.raw()
    writer.write(
        f"POST /dlr/{TOKEN} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        "Expect: 100-continue\r\nContent-Length: 23\r\n\r\n".encode()
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"sms_id=a&status=DELIVRD")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


# ------------------------------------------------------------------------------------- the log


async def test_refusals_are_told_without_flooding(it: Serving) -> None:
    """However many there are, a reason has one line a second, and the counts add up."""
    await asyncio.gather(*[it.get("/dlr/wrong", **REPORT) for _ in range(50)])
    assert await it.report("") == 400
    await it.server.close()
    lines = it.told("report.refused")
    tokens = [line for line in lines if line["reason"] == "wrong token"]
    assert sum(line["count"] for line in tokens) == 50
    assert len(tokens) < 10
    assert {(line["status"], line["address"]) for line in tokens} == {(404, "127.0.0.1")}
    assert [line["count"] for line in lines if line["reason"] == "parameter missing"] == [1]


async def test_a_second_of_silence_ends_the_holding_back(it: Serving) -> None:
    """What was held back is told when the second is over, and then nothing is held."""
    for _ in range(3):
        await it.get("/dlr/wrong", **REPORT)
    await until(lambda: sum(line["count"] for line in it.told("report.refused")) == 3)
    await until(lambda: not it.server._refusals._held)


async def test_neither_token_nor_parameters_are_logged(it: Serving) -> None:
    """Of what comes in an address or a body only identifier and word are told."""
    number, text = "359881234567", "Vashata faktura"
    url = f"/dlr/{TOKEN}"
    await it.get(url, **REPORT, msisdn=number, text=text)
    await it.get(url, sms_id="a", status=number)
    await it.get(url, msisdn=number)
    await it.get(f"/dlr/{number}", **REPORT)
    await it.exchange(f"GET {url}?msisdn={number} HTTP/1.1\r\nbroken\r\n\r\n".encode())
    await it.exchange(f"GET {url}?msisdn={number}{'x' * 50_000} HTTP/1.1\r\n\r\n".encode())
    await it.server.close()
    told = json.dumps(it.events, default=str)
    assert len(it.told("report.received")) == 2
    assert len(it.told("report.refused")) >= 3
    assert all(secret not in told for secret in (TOKEN, number, text, "/dlr/"))


async def test_a_failure_of_ours_is_told_without_its_words(it: Serving) -> None:
    """An error inside a handler answers 500 and reaches the log as an exception only."""

    def fail() -> str | None:
        raise LookupError("359881234567")

    it.server._unready = fail
    status, body = await it.get("/readyz")
    assert (status, body) == (500, "Internal error\n")
    (line,) = it.told("http.failed")
    assert isinstance(line["exc_info"], LookupError)
    assert await it.get("/healthz") == (200, '{"status":"ok"}')
