"""The database goes away, comes back, and takes nothing for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import pytest

from dispatcher.db import outbox
from tests.e2e.harness import until_statuses
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered

LEASE: Final = 1.5
LONG: Final = 2 * LEASE
"""Seconds of an outage that no lease outlives."""

Fault: TypeAlias = Callable[[Scene], Awaitable[None]]


async def restart_fast(scene: Scene) -> None:
    """The server restarts in order."""
    await scene.postgres.stop("fast")
    await scene.postgres.start()


async def restart_immediate(scene: Scene) -> None:
    """The server crashes and recovers."""
    await scene.postgres.stop("immediate")
    await scene.postgres.start()


async def kill(scene: Scene) -> None:
    """The postmaster is killed."""
    await scene.postgres.kill()
    await scene.postgres.start()


async def away(scene: Scene) -> None:
    """The server is gone for longer than a lease."""
    await scene.postgres.stop("fast")
    await asyncio.sleep(LONG)
    await scene.postgres.start()


async def freeze_link(scene: Scene) -> None:
    """Nothing passes for longer than a lease, and nobody is told."""
    scene.proxy.freeze()
    await asyncio.sleep(LONG)
    scene.proxy.thaw()


async def freeze_server(scene: Scene) -> None:
    """The server stands still for longer than a lease."""
    scene.postgres.freeze()
    await asyncio.sleep(LONG)
    scene.postgres.thaw()


async def shut_link(scene: Scene) -> None:
    """Connections are refused for longer than a lease."""
    scene.proxy.shut()
    await asyncio.sleep(LONG)
    await scene.proxy.listen()


async def cut_links(scene: Scene) -> None:
    """Every connection breaks, again and again."""
    for _ in range(20):
        scene.proxy.cut()
        await asyncio.sleep(0.1)


async def terminate_backends(scene: Scene) -> None:
    """An administrator ends every session, again and again."""
    for _ in range(20):
        await scene.postgres.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE 'dispatcher%'"
        )
        await asyncio.sleep(0.1)


async def read_only(scene: Scene) -> None:
    """The server takes no writes, as a standby."""
    await scene.postgres.run(
        "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"
    )
    await asyncio.sleep(LONG)
    await scene.postgres.run(
        "ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()"
    )


async def disk_full_for_claims(scene: Scene) -> None:
    """The disk is full whenever a claim comes."""
    trap = scene.proxy.refuse(outbox._CLAIM, "53100")
    await asyncio.sleep(LONG)
    trap.lift()


async def disk_full_for_records(scene: Scene) -> None:
    """The disk is full whenever results come."""
    trap = scene.proxy.refuse(outbox._RECORD, "53100")
    await asyncio.sleep(LONG)
    trap.lift()


OUTAGES: Final = [
    restart_fast,
    restart_immediate,
    kill,
    away,
    freeze_link,
    freeze_server,
    shut_link,
    cut_links,
    terminate_backends,
    read_only,
    disk_full_for_claims,
    disk_full_for_records,
]


FLUTTERING: Final = {cut_links, terminate_backends}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault, id=fault.__name__, marks=[] if fault is restart_immediate else pytest.mark.faults
        )
        for fault in OUTAGES
    ],
)
async def test_database(scene: Scene, fault: Fault) -> None:
    """Workers outlive it, lose no answer, send nothing twice, and count exactly."""
    scene.provider.latency = 0.05
    workers = [await scene.worker(lease=LEASE, concurrency=4, request_timeout=30) for _ in range(2)]
    await add_numbered(scene.connection, 400)
    await scene.provider.came(20)
    await fault(scene)
    async with scene.postgres.connection(scene.database) as connection:
        await until_statuses(connection, accepted=400)

        for worker in workers:
            back = await worker.event("database.back", nth=len(worker.seen("database.lost")))
            if fault not in FLUTTERING:
                assert len(worker.seen("database.lost")) <= 3, "one outage is told over and over"
            status, _ = await worker.get("/readyz")
            assert (back["level"], status) == ("info", 200)
            assert not worker.seen("worker.rescued"), "it buried one that could not beat"
        for worker in workers:
            assert await worker.stop() == 0
        await invariant.hold(connection, scene.provider, *workers)
