"""HTTP/1.1 as far as the provider speaks it: bytes in, a request out; an answer in, bytes out."""

import re
from dataclasses import dataclass
from http import HTTPStatus

HEAD_MAX = 64 * 1024
BODY_MAX = 1024 * 1024

_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPES = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_LENGTH = re.compile(rb"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One whole request; `keep` says whether the client wants to use the connection again."""

    method: str
    path: str
    query: str
    body: bytes
    keep: bool


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no request; after them nothing on the connection can be understood."""

    status: HTTPStatus


def take(buffer: bytearray) -> HttpRequest | Malformed | None:
    """Remove the first whole request from the buffer; None while it is not all there."""
    end = buffer.find(b"\r\n\r\n", 0, HEAD_MAX)
    if end < 0:
        too_long = len(buffer) >= HEAD_MAX
        return Malformed(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) if too_long else None
    first, *fields = bytes(buffer[:end]).split(b"\r\n")
    line = first.split(b" ")
    if len(line) != 3 or not first.isascii() or line[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        return Malformed(HTTPStatus.BAD_REQUEST)
    headers = {}
    for field in fields:
        name, colon, value = field.partition(b":")
        if not colon or not name or name != name.strip():
            return Malformed(HTTPStatus.BAD_REQUEST)
        headers[name.lower()] = value.strip()
    if b"transfer-encoding" in headers:
        return Malformed(HTTPStatus.LENGTH_REQUIRED)
    length = headers.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        return Malformed(HTTPStatus.BAD_REQUEST)
    size = int(length)
    if size > BODY_MAX:
        return Malformed(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    start = end + 4
    if len(buffer) < start + size:
        return None
    body = bytes(buffer[start : start + size])
    del buffer[: start + size]
    path, _, query = line[1].decode("ascii").partition("?")
    wish = headers.get(b"connection", b"").lower()
    keep = wish != b"close" if line[2] == b"HTTP/1.1" else wish == b"keep-alive"
    return HttpRequest(line[0].decode("ascii"), path, query, body, keep)


def response(
    status: int, body: bytes, *, keep: bool, kind: str = "text/plain; charset=utf-8"
) -> bytes:
    """The bytes of a whole answer."""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"Content-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
    ).encode("ascii") + body


def decode(query: str) -> dict[str, str] | None:
    """A query's parameters; None if it cannot be read without guessing.

    As forms are encoded (WHATWG URL, application/x-www-form-urlencoded), but strict: a parameter
    given twice, an escape without two hex digits or bytes that are no UTF-8 are refused, since a
    lenient reading would hide a client that encodes wrongly.
    """
    parameters: dict[str, str] = {}
    if _BROKEN_ESCAPE.search(query):
        return None
    try:
        for pair in query.split("&"):
            name, _, value = pair.partition("=")
            name, value = _text(name), _text(value)
            if name in parameters:
                return None
            parameters[name] = value
    except UnicodeDecodeError:
        return None
    return parameters


def _text(encoded: str) -> str:
    # What stands between escapes is ASCII, so no character spans two runs of them.
    spaced = encoded.replace("+", " ")
    return _ESCAPES.sub(_unescape, spaced) if "%" in spaced else spaced


def _unescape(run: re.Match[str]) -> str:
    return bytes.fromhex(run[0].replace("%", "")).decode("utf-8")
