"""The provider of the benchmarks: a raw server that answers at once and notes what came when.

It runs in a process of its own and does as little as it can, so that it is not what is measured;
the notes lie in a file that both sides map, so that reading them costs it nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import mmap
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple, Self, cast

import uvloop

from bench.processes import Process, started

PATH: Final = "/users/send_bulk.php"

_COUNT: Final = Struct("q")
_ROW: Final = Struct("qqqq")


class Arrival(NamedTuple):
    """One request, as it came."""

    at: int
    """Nanoseconds of the monotonic clock, which all processes of a machine share."""
    service_id: int
    number: int
    accepted: int
    """0 if it came too soon after the one before it."""


class Notes:
    """What came, in a file: a count, then a row for each request."""

    def __init__(self, path: Path, *, room: int = 0) -> None:
        """Open the notes; `room`, a number of rows, makes them."""
        if room:
            with path.open("wb") as file:
                file.truncate(_COUNT.size + room * _ROW.size)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._written = 0

    def __len__(self) -> int:
        """How many requests came so far."""
        return cast(int, _COUNT.unpack_from(self._map)[0])

    def since(self, first: int) -> list[Arrival]:
        """The requests that came from the given one on, counted from 0."""
        return [
            Arrival(*_ROW.unpack_from(self._map, _COUNT.size + index * _ROW.size))
            for index in range(first, len(self))
        ]

    def add(self, service_id: int, number: int, accepted: int, at: int) -> None:
        """Note one more."""
        _ROW.pack_into(
            self._map, _COUNT.size + self._written * _ROW.size, at, service_id, number, accepted
        )
        self._written += 1
        _COUNT.pack_into(self._map, 0, self._written)

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()


class Settings(NamedTuple):
    """How the provider behaves."""

    min_delay: float = 0.0
    """Seconds that must lie between two accepted requests of a service, as they arrive."""
    answer_after: tuple[float, float] = (0.0, 0.0)
    """Seconds from a request to its answer: at random between these."""


AT_ONCE: Final = Settings()


class _Connection(asyncio.Protocol):
    _transport: asyncio.Transport

    def __init__(self, notes: Notes, settings: Settings, accepted_at: dict[int, int]) -> None:
        self._notes = notes
        self._min_delay = int(settings.min_delay * 1e9)
        self._answer_after = settings.answer_after
        self._accepted_at = accepted_at
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._received:
            data = self._received + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            self._request(data, now)
            data = data[end + 4 :]
        self._received = data

    def _request(self, data: bytes, now: int) -> None:
        service_id, number = _field(data, b"service_id="), _field(data, b"msisdn=")
        accepted = 1
        if self._min_delay:
            last = self._accepted_at.get(service_id)
            if last is not None and now - last < self._min_delay:
                accepted = 0
            else:
                self._accepted_at[service_id] = now
        self._notes.add(service_id, number, accepted, now)
        body = b"MSG_OK:%d" % len(self._notes) if accepted else b"LIMIT_DELAY"
        answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (
            len(body),
            body,
        )
        least, most = self._answer_after
        if most:
            loop = asyncio.get_running_loop()
            loop.call_later(random.uniform(least, most), self._transport.write, answer)
        else:
            self._transport.write(answer)


def _field(data: bytes, name: bytes) -> int:
    begin = data.find(name) + len(name)
    end = begin
    while 48 <= data[end] <= 57:
        end += 1
    return int(data[begin:end])


class Provider:
    """A provider that runs: its address, its process, its notes."""

    def __init__(self, process: Process, notes: Notes, port: int) -> None:
        self.process = process
        self.notes = notes
        self.port = port

    @property
    def url(self) -> str:
        """What requests are sent to."""
        return f"http://127.0.0.1:{self.port}{PATH}"

    @classmethod
    @asynccontextmanager
    async def running(
        cls, folder: Path, settings: Settings = AT_ONCE, *, room: int = 1_000_000
    ) -> AsyncIterator[Self]:
        """Run a provider in a process of its own; `room`: requests that it can note."""
        path = folder / "notes"
        notes = Notes(path, room=room)
        command = (
            *(sys.executable, "-m", "bench.provider", str(path)),
            *("--min-delay", str(settings.min_delay)),
            *("--answer-after", *map(str, settings.answer_after)),
        )
        async with started(command, folder / "provider.log") as process:
            yield cls(process, notes, int(await process.first_line()))
        notes.close()
        path.unlink()


async def _serve(notes: Notes, settings: Settings) -> None:
    accepted_at: dict[int, int] = {}
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(notes, settings, accepted_at), "127.0.0.1", 0, backlog=1024
    )
    os.write(1, b"%d\n" % server.sockets[0].getsockname()[1])
    gc.freeze()
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notes", type=Path)
    parser.add_argument("--min-delay", type=float, default=0.0)
    parser.add_argument("--answer-after", type=float, nargs=2, default=(0.0, 0.0))
    found = parser.parse_args()
    least, most = found.answer_after
    uvloop.run(_serve(Notes(found.notes), Settings(found.min_delay, (least, most))))


if __name__ == "__main__":
    main()
