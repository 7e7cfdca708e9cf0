"""Bytes to requests, and queries to parameters."""

from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.simulator.http import (
    BODY_MAX,
    HEAD_MAX,
    HttpRequest,
    Malformed,
    decode,
    response,
    take,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(TEXTS, TEXTS, min_size=1))
def test_decode_reverses_encoding(parameters: dict[str, str]) -> None:
    """Whatever was encoded as a form comes back, with spaces as `+` or as `%20`."""
    assert decode(urlencode(parameters, quote_via=quote_plus)) == parameters
    assert decode(urlencode(parameters, quote_via=quote, safe="")) == parameters


@pytest.mark.parametrize(
    ("query", "parameters"),
    [
        ("text=a+b%2Bc%20d", {"text": "a b+c d"}),
        ("text=%D0%97%D0%B4%d1%80", {"text": "Здр"}),
        ("text=%F0%9F%98%80", {"text": "😀"}),
        ("text=a%26b%3Dc&x=1", {"text": "a&b=c", "x": "1"}),
        ("text=a=b", {"text": "a=b"}),
        ("text=", {"text": ""}),
        ("text", {"text": ""}),
        ("text=%00%0A", {"text": "\0\n"}),
    ],
)
def test_decode(query: str, parameters: dict[str, str]) -> None:
    """Escapes, `+` and UTF-8 are read as forms are written."""
    assert decode(query) == parameters


@pytest.mark.parametrize(
    "query",
    ["text=100%", "text=%4", "text=%zz", "text=%u0431", "text=%D0", "text=%FF", "a=1&a=1", "&"],
)
def test_decode_refuses_to_guess(query: str) -> None:
    """A broken escape, bytes that are no UTF-8 and a parameter given twice are not read."""
    assert decode(query) is None


@pytest.mark.parametrize(
    ("data", "request_"),
    [
        (
            b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n",
            HttpRequest("GET", "/a", "b=c", b"", keep=True),
        ),
        (b"GET /a HTTP/1.1\r\n\r\n", HttpRequest("GET", "/a", "", b"", keep=True)),
        (
            b"GET /a HTTP/1.1\r\nConnection: Close\r\n\r\n",
            HttpRequest("GET", "/a", "", b"", keep=False),
        ),
        (b"GET /a HTTP/1.0\r\n\r\n", HttpRequest("GET", "/a", "", b"", keep=False)),
        (
            b"GET /a HTTP/1.0\r\nconnection:keep-alive\r\n\r\n",
            HttpRequest("GET", "/a", "", b"", keep=True),
        ),
        (
            b"POST /a HTTP/1.1\r\nCONTENT-LENGTH: 3\r\n\r\nabc",
            HttpRequest("POST", "/a", "", b"abc", keep=True),
        ),
    ],
)
def test_take(data: bytes, request_: HttpRequest) -> None:
    """A request is taken once it is whole, not a byte sooner, and what follows it stays."""
    buffer = bytearray()
    for byte in data[:-1]:
        buffer.append(byte)
        assert take(buffer) is None
    buffer += data[-1:] + b"GET /next"

    assert take(buffer) == request_
    assert buffer == b"GET /next"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400),
        (b"GET /a\r\nb HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xd0\xb0 HTTP/1.1\r\n\r\n", 400),
        (b"GET /a HTTP/2.0\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (f"POST /a HTTP/1.1\r\nContent-Length: {BODY_MAX + 1}\r\n\r\n".encode(), 413),
        (b"GET /" + b"a" * HEAD_MAX, 431),
    ],
)
def test_malformed(data: bytes, status: int) -> None:
    """What is no request, or too large a one, is refused with its status."""
    assert take(bytearray(data)) == Malformed(status)  # type: ignore[arg-type]  # equal as numbers


def test_response() -> None:
    """An answer has its length, its kind and what becomes of the connection."""
    assert response(503, b"error", keep=False, kind="text/x") == (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/x\r\nContent-Length: 5\r\n"
        b"Connection: close\r\n\r\nerror"
    )
