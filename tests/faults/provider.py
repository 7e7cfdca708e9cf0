"""A provider with books: it counts every request for every message, and knows what it said."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from tests.faults.texts import number_of
from tests.integration.wire.raw_provider import RawProvider, Received


@dataclass
class Entry:
    """One request, as the provider's books have it."""

    message: int
    service_id: int
    user_id: int
    msisdn: str
    came: float
    """By `time.monotonic`."""
    booked: bool = False
    """Accepted: an SMS goes out and is paid for, whether or not we were told."""
    refused: bool = False
    """Answered, in a way that tells for certain that no SMS goes out."""
    reply: str | None = None
    """What was answered; None if nothing was."""


Conduct = Callable[["Provider", Received, Entry], Awaitable[None]]


async def accept(provider: Provider, request: Received, entry: Entry) -> None:
    """Take the message and say so."""
    entry.booked = True
    entry.reply = f"MSG_OK:p{request.number}"
    await request.line.answer(entry.reply.encode())


def refuse(reply: str) -> Conduct:
    """Answer with a refusal of the table."""

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        entry.refused = True
        entry.reply = reply
        await request.line.answer(reply.encode())

    return conduct


async def keep_silent(provider: Provider, request: Received, entry: Entry) -> None:
    """Take the message and never answer."""
    entry.booked = True


class Provider(RawProvider):
    """Plays `conduct` for each request, after a wait; an async context manager."""

    def __init__(self, conduct: Conduct = accept, *, latency: float = 0.0) -> None:
        super().__init__(self._play)
        self.conduct = conduct
        self.latency = latency
        self.gate = asyncio.Event()
        """While clear, requests are counted and nothing is answered."""
        self.gate.set()
        self.books: dict[int, list[Entry]] = defaultdict(list)
        """All requests by the number of their message, as `texts` has it."""
        self.entries: list[Entry] = []
        self._came = asyncio.Condition()

    async def _play(self, request: Received) -> None:
        told = dict(request.parameters)
        assert len(told) == len(request.parameters), "a parameter came twice"
        entry = Entry(
            number_of(told["text"]),
            int(told["service_id"]),
            int(told["user_id"]),
            told["msisdn"],
            monotonic(),
        )
        self.entries.append(entry)
        self.books[entry.message].append(entry)
        async with self._came:
            self._came.notify_all()
        if self.latency:
            await asyncio.sleep(self.latency)
        await self.gate.wait()
        await self.conduct(self, request, entry)

    async def came(self, requests: int, within: float = 45.0) -> None:
        """Wait until so many requests have come in all."""
        async with asyncio.timeout(within), self._came:
            await self._came.wait_for(lambda: len(self.entries) >= requests)

    @property
    def booked(self) -> int:
        """How many SMS go out."""
        return sum(entry.booked for entry in self.entries)
