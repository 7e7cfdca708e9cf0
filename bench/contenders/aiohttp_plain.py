"""aiohttp alone, as one writes it: no database, nothing kept, nothing guarded."""

from __future__ import annotations

import asyncio

import aiohttp

from bench.contenders.task import CONCURRENCY, Task

LABEL = "aiohttp alone"
SETTINGS = "ClientSession() as it comes, 100 tasks that take the next message, uvloop"
SHARE = 1.0
RECORDED = None


async def prepare(task: Task) -> None:
    """Nothing waits anywhere."""


async def run(task: Task) -> None:
    """Send all messages."""
    waiting = task.messages
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:

        async def sender() -> None:
            for message in waiting:
                async with session.get(task.url, params=message.parameters) as response:
                    response.raise_for_status()
                    await response.text()

        for _ in range(CONCURRENCY):
            group.create_task(sender())
