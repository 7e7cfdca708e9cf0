"""A million messages are no more trouble than ten."""

from __future__ import annotations

import psutil
import pytest

from tests.e2e.harness import Connection, Worker, wait_for
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered

MEBIBYTE = 2**20


def _resident(worker: Worker) -> int:
    return int(psutil.Process(worker.process.pid).memory_info().rss)


@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_million(scene: Scene) -> None:
    """A worker that starts on 1,000,000 waiting messages sends at once, in flat memory."""
    await add_numbered(scene.connection, 1_000_000)
    running = await scene.worker(concurrency=20)
    # One look at the outbox; whoever reads a table of a million rows takes longer.
    await scene.provider.came(1, within=15)
    await scene.provider.came(500)
    before = _resident(running)
    await scene.provider.came(5_000, within=200)
    assert _resident(running) - before < 16 * MEBIBYTE

    held = await scene.connection.fetchval("SELECT count(*) FROM outbox WHERE status = 'sending'")
    assert held <= 2 * 20
    assert await running.stop() == 0
    await _settled(scene, scene.connection)


async def _settled(scene: Scene, connection: Connection) -> None:
    """What was sent is known as sent, each once; the rest waits."""

    async def recorded() -> bool:
        return bool(
            await connection.fetchval(
                "SELECT count(*) FILTER (WHERE status = 'accepted') = $1 "
                "AND count(*) FILTER (WHERE status = 'pending') = 1000000 - $1 FROM outbox",
                len(scene.provider.entries),
            )
        )

    await wait_for(recorded, "all is recorded")
    assert all(len(entries) == 1 for entries in scene.provider.books.values())
