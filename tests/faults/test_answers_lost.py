"""The database did what it was asked, and nobody heard it say so."""

from __future__ import annotations

import pytest

from dispatcher.db import outbox
from tests.e2e.harness import until_statuses
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered


@pytest.mark.parametrize("fault", ["swallow", "hang", "lose"])
async def test_claim(scene: Scene, fault: str) -> None:
    """What a claim took whose answer was lost goes back, and is sent once."""
    trap = getattr(scene.proxy, fault)(outbox._CLAIM)
    await add_numbered(scene.connection, 30)
    running = await scene.worker()
    await until_statuses(scene.connection, accepted=30)

    assert trap.sprung == 1
    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)


@pytest.mark.parametrize("fault", ["swallow", "hang", "lose"])
async def test_record(scene: Scene, fault: str) -> None:
    """Results whose writing was not confirmed are written once."""
    trap = getattr(scene.proxy, fault)(outbox._RECORD)
    await add_numbered(scene.connection, 30)
    running = await scene.worker()
    await until_statuses(scene.connection, accepted=30)

    assert trap.sprung == 1
    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)
