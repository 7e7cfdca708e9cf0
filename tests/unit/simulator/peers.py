"""The simulator's peers in its tests: a client on a raw socket, a script that takes reports."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import quote_plus

from aiohttp import web

from dispatcher.simulator.server import PATH


class RawClient:
    """One connection on which requests are written byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        """Put bytes on the wire."""
        self.writer.write(data)

    async def read(self) -> tuple[int, str]:
        """The next answer: its status and its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await self.reader.readexactly(length)
        return int(head.split()[1]), body.decode("utf-8", "replace")

    async def get(self, target: str) -> tuple[int, str]:
        """The answer to a GET of a path with its query."""
        self.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return await self.read()

    async def post(self, target: str, body: str = "") -> tuple[int, str]:
        """The answer to a POST of a JSON text."""
        content = body.encode()
        self.write(
            f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            "".encode()
            + content
        )
        return await self.read()

    async def send(
        self,
        msisdn: str = "359881234567",
        text: str = "hello",
        *,
        service: int = 42,
        user: int = 7,
        extended: bool = False,
    ) -> str:
        """The provider's answer to one message."""
        return (await self.get(target(msisdn, text, service, user, extended=extended)))[1]

    async def close(self) -> None:
        """End the connection."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


def target(
    msisdn: str = "359881234567",
    text: str = "hello",
    service: int = 42,
    user: int = 7,
    *,
    extended: bool = False,
) -> str:
    """The path and query that ask for one message."""
    ending = "&extended=yes" if extended else ""
    return (
        f"{PATH}?user_id={user}&service_id={service}&msisdn={msisdn}&text={quote_plus(text)}"
        f"{ending}"
    )


@dataclass
class Script:
    """A script that takes delivery reports: what came, and what to answer."""

    url: str = ""
    reports: list[tuple[str, str]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0
    at_most: int = 0

    async def take(self, request: web.Request) -> web.Response:
        """Note a report; answer as told, or 200."""
        self.at_once += 1
        self.at_most = max(self.at_most, self.at_once)
        await self.gate.wait()
        self.at_once -= 1
        self.reports.append((request.query["sms_id"], request.query["status"]))
        status = self.answers.pop(0) if self.answers else 200
        return web.Response(status=status, text="OK", headers={"Location": str(request.url)})


Connect = Callable[..., Awaitable[RawClient]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
