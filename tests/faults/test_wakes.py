"""Messages are sent also when nobody is told of them."""

from __future__ import annotations

import pytest

from dispatcher.db.listen import HEARTBEAT
from tests.e2e.harness import until_statuses
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered

NEVER = 3600
"""Seconds between two polls, so that only what wakes a worker can make it send."""


@pytest.mark.faults
async def test_notify_lost(scene: Scene) -> None:
    """An insert that tells nobody is found by polling."""
    await scene.connection.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_wake")
    running = await scene.worker(poll_interval=0.3)
    await until_statuses(scene.connection)
    await add_numbered(scene.connection, 10)
    await until_statuses(scene.connection, accepted=10)

    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)


async def test_listening_again(scene: Scene) -> None:
    """A worker whose listening connection was ended finds what was inserted meanwhile."""
    running = await scene.worker(poll_interval=NEVER)
    for sent in range(10, 50, 10):
        await scene.postgres.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'dispatcher listen'"
        )
        await add_numbered(scene.connection, 10, first=sent - 9)
        # Sooner than the connection is looked at in any case.
        await until_statuses(scene.connection, accepted=sent, within=0.6 * HEARTBEAT)

    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)
