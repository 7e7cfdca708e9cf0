"""aiohttp alone, tuned: all that can be left out is left out."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import aiohttp
from yarl import URL

from bench.contenders.task import CONCURRENCY, SERVICE, USER, Task

LABEL = "aiohttp alone, tuned"
SETTINGS = (
    "URL ready encoded, one timer for all instead of a timeout each, no redirects, no cookies, "
    "no automatic headers, body as it comes, uvloop"
)
SHARE = 1.0
RECORDED = None

TIMEOUT = 15.0


async def prepare(task: Task) -> None:
    """Nothing waits anywhere."""


async def run(task: Task) -> None:
    """Send all messages."""
    waiting = task.messages
    base = f"{task.url}?user_id={USER}&service_id={SERVICE}"
    busy: dict[asyncio.Task[None], float] = {}
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        while True:
            await asyncio.sleep(TIMEOUT / 10)
            for sending, began in list(busy.items()):
                if loop.time() - began > TIMEOUT:
                    sending.cancel()

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONCURRENCY),
        timeout=aiohttp.ClientTimeout(),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        auto_decompress=False,
    ) as session:

        async def sender() -> None:
            me = asyncio.current_task()
            assert me is not None
            for message in waiting:
                busy[me] = loop.time()
                url = URL(
                    f"{base}&msisdn={message.number}&text={quote(message.text)}&extended=yes",
                    encoded=True,
                )
                async with session.get(url, allow_redirects=False) as response:
                    await response.read()
            del busy[me]

        watching = asyncio.create_task(watch())
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(sender())
        watching.cancel()
