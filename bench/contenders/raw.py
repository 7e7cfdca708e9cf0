"""A raw client, to show that the provider is not what is measured."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import cast
from urllib.parse import quote, urlsplit

from bench.contenders.task import CONCURRENCY, SERVICE, USER, Task

LABEL = "raw client (the provider's own limit)"
SETTINGS = "ready-made requests over 100 bare connections, the answers counted only, uvloop"
SHARE = 6.0
RECORDED = None


class _Sender(asyncio.Protocol):
    _transport: asyncio.Transport

    def __init__(self, requests: list[bytes], done: asyncio.Future[None]) -> None:
        self._requests = requests
        self._done = done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def data_received(self, _: bytes) -> None:
        self._next()

    def _next(self) -> None:
        if self._requests:
            self._transport.write(self._requests.pop())
        else:
            self._transport.close()
            self._done.set_result(None)


async def prepare(task: Task) -> None:
    """Nothing waits anywhere."""


async def run(task: Task) -> None:
    """Send all messages."""
    address = urlsplit(task.url)
    requests = [
        (
            f"GET {address.path}?user_id={USER}&service_id={SERVICE}&msisdn={message.number}"
            f"&text={quote(message.text)}&extended=yes HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n"
        ).encode()
        for message in task.messages
    ]
    loop = asyncio.get_running_loop()
    all_done: list[asyncio.Future[None]] = [loop.create_future() for _ in range(CONCURRENCY)]
    assert address.hostname is not None
    assert address.port is not None
    for done in all_done:
        await loop.create_connection(
            partial(_Sender, requests, done), address.hostname, address.port
        )
    await asyncio.gather(*all_done)
