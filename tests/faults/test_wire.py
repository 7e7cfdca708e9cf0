"""A provider that breaks off, keeps silent, and closes its connections, under load."""

from __future__ import annotations

import asyncio
from random import Random
from signal import SIGCONT, SIGSTOP
from typing import Final

import pytest

from tests.e2e.harness import until_statuses, wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.provider import Conduct, Entry, Provider, accept, keep_silent
from tests.faults.texts import add_numbered
from tests.integration.wire.raw_provider import Received

TIMEOUT: Final = 1.0
"""Seconds that a worker waits for an answer."""

OK: Final = b"HTTP/1.1 200 OK\r\n"


def breaks_off(*pieces: bytes, booked: bool, reset: bool = False) -> Conduct:
    """Write this, then close the connection; `booked`: the SMS goes out all the same."""

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        entry.booked = booked
        await request.line.write(*pieces)
        if reset:
            request.line.reset()
        else:
            request.line.hang_up()

    return conduct


def says(status: bytes, body: bytes) -> Conduct:
    """Answer in a way that is none of the table's."""

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        entry.booked = True
        await request.line.answer(body, status)

    return conduct


async def too_late(provider: Provider, request: Received, entry: Entry) -> None:
    """Answer when nobody waits for it any more."""
    entry.booked = True
    await asyncio.sleep(1.5 * TIMEOUT)
    await request.line.answer(b"MSG_OK:late")


async def byte_by_byte(provider: Provider, request: Received, entry: Entry) -> None:
    """Drip an answer that never ends in time."""
    entry.booked = True
    for byte in OK + b"Content-Length: 8\r\n\r\nMSG_OK:1":
        await request.line.write(bytes([byte]))
        await asyncio.sleep(TIMEOUT / 20)


FAULTS: Final = (
    keep_silent,
    too_late,
    byte_by_byte,
    breaks_off(booked=True),
    breaks_off(booked=False),
    breaks_off(booked=True, reset=True),
    breaks_off(booked=False, reset=True),
    breaks_off(b"HTTP/1.1 20", booked=True),
    breaks_off(OK + b"Content-Length: 8\r\n\r\nMSG_OK:", booked=True),
    breaks_off(OK + b"Content-Length: 9\r\n\r\nMSG_OK:1", booked=True, reset=True),
    breaks_off(b"MSG_OK:1\r\n\r\n", booked=True),
    says(b"500 Internal Server Error", b"MSG_OK:1"),
    says(b"503 Service Unavailable", b""),
    says(b"302 Found\r\nLocation: /send.php", b""),
    says(b"200 OK", b"MSG_OKAY"),
    says(b"200 OK", b"MSG_OK:"),
    says(b"200 OK", b"<html>MSG_OK:1</html>"),
    says(b"200 OK\r\nContent-Encoding: gzip", b"MSG_OK:1\xff"),
)


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(2))
async def test_every_fault_under_load(scene: Scene, seed: int) -> None:
    """Whatever breaks, a message is asked for once, and is in doubt exactly if it broke."""
    chance = Random(seed)
    broken: list[Entry] = []

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        if chance.random() < 0.15:
            broken.append(entry)
            await chance.choice(FAULTS)(provider, request, entry)
        else:
            await accept(provider, request, entry)

    scene.provider.conduct = conduct
    scene.provider.latency = 0.02
    workers = [
        await scene.worker(concurrency=10, request_timeout=TIMEOUT, keepalive=0.5) for _ in range(3)
    ]
    await add_numbered(scene.connection, 600)

    async def done() -> bool:
        return not await scene.connection.fetchval(
            "SELECT EXISTS (SELECT FROM outbox WHERE status IN ('pending', 'sending'))"
        )

    await wait_for(done, "all are sent", within=200)
    for worker in workers:
        assert await worker.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *workers)
    assert found == {"accepted": 600 - len(broken), "unknown": len(broken)}
    assert len(scene.provider.entries) == 600


async def test_idle_connections_are_closed(scene: Scene) -> None:
    """A provider that closes connections earlier than we do puts nothing in doubt."""
    concurrency, rounds = 4, 10
    closed = 0

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        nonlocal closed
        await accept(provider, request, entry)
        request.line.hang_up()
        closed += 1

    scene.provider.conduct = conduct
    scene.provider.gate.clear()
    running = await scene.worker(concurrency=concurrency, keepalive=60)
    await add_numbered(scene.connection, concurrency * rounds)
    for sent in range(concurrency, concurrency * rounds + 1, concurrency):

        async def in_flight(sent: int = sent) -> bool:
            return len(scene.provider.entries) >= sent or bool(running.seen("message.unknown"))

        await wait_for(in_flight, "the next messages")
        assert not running.seen("message.unknown")
        # Frozen, so that it finds answer and end together, and its next message takes the
        # connection before it has read of the end.
        running.signal(SIGSTOP)
        scene.provider.gate.set()

        async def all_closed(sent: int = sent) -> bool:
            return closed >= sent

        await wait_for(all_closed, "the ends of the connections")
        scene.provider.gate.clear()
        running.signal(SIGCONT)
    await until_statuses(scene.connection, accepted=concurrency * rounds)

    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)


@pytest.mark.faults
async def test_outage(scene: Scene) -> None:
    """A provider that falls silent leaves in doubt what was in flight, and one a probe."""
    concurrency = 5
    workers = [await scene.worker(concurrency=concurrency, request_timeout=0.5) for _ in range(3)]
    scene.provider.conduct = keep_silent
    await add_numbered(scene.connection, 200)

    async def probed() -> bool:
        return sum(len(worker.seen("egress.probing")) for worker in workers) >= 2

    await wait_for(probed, "two probes")
    scene.provider.conduct = accept
    probes = 2

    async def done() -> bool:
        return not await scene.connection.fetchval(
            "SELECT EXISTS (SELECT FROM outbox WHERE status IN ('pending', 'sending'))"
        )

    await wait_for(done, "it goes on", within=90)
    for worker in workers:
        assert await worker.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *workers)
    assert 5 <= found["unknown"] <= 2 * concurrency * len(workers) + probes
    assert found["accepted"] == 200 - found["unknown"]
