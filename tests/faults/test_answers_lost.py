"""The database did what it was asked, and nobody heard it say so."""

from __future__ import annotations

import pytest

from dispatcher.db import outbox
from tests.e2e.harness import until_statuses
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.provider import Entry, Provider, accept, refuse
from tests.faults.texts import add_numbered
from tests.integration.wire.raw_provider import Received


@pytest.mark.parametrize(
    "fault",
    [
        "swallow",
        pytest.param("hang", marks=pytest.mark.faults),
        pytest.param("lose", marks=pytest.mark.faults),
    ],
)
async def test_claim(scene: Scene, fault: str) -> None:
    """What a claim took whose answer was lost goes back, and is sent once."""
    trap = getattr(scene.proxy, fault)(outbox._CLAIM)
    await add_numbered(scene.connection, 30)
    running = await scene.worker()
    await until_statuses(scene.connection, accepted=30)

    assert trap.sprung == 1
    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)


@pytest.mark.faults
@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
async def test_claim_that_comes_late(scene: Scene, leaves: bool) -> None:  # noqa: FBT001 - a case
    """A claim that runs long after its worker gave it up holds nothing for good."""
    held = scene.proxy.hold(outbox._CLAIM)
    await add_numbered(scene.connection, 30)
    running = await scene.worker(lease=1)
    await held.caught()
    if leaves:
        await running.event("database.lost")
        assert await running.stop() == 0
        held.lift()
        running = await scene.worker(lease=1)
    else:
        await until_statuses(scene.connection, accepted=30)
        await add_numbered(scene.connection, 30, first=31)
        held.lift()
    await until_statuses(scene.connection, accepted=30 if leaves else 60)

    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, *scene.workers)


@pytest.mark.faults
async def test_record_that_comes_late(scene: Scene) -> None:
    """Results that are written long after they were written again change nothing."""
    answers = iter([refuse("LIMIT_DELAY")] * 5)

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        await next(answers, accept)(provider, request, entry)

    scene.provider.conduct = conduct
    held = scene.proxy.hold(outbox._RECORD)
    await add_numbered(scene.connection, 5)
    running = await scene.worker()
    await held.caught()
    await until_statuses(scene.connection, accepted=5)
    held.lift()
    await add_numbered(scene.connection, 5, first=6)
    await until_statuses(scene.connection, accepted=10)

    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)


@pytest.mark.parametrize(
    "fault",
    [
        "swallow",
        pytest.param("hang", marks=pytest.mark.faults),
        pytest.param("lose", marks=pytest.mark.faults),
    ],
)
async def test_record(scene: Scene, fault: str) -> None:
    """Results whose writing was not confirmed are written, and their quota given back, once."""

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        answer = refuse("INVALID_MSISDN") if entry.message % 3 == 0 else accept
        await answer(provider, request, entry)

    scene.provider.conduct = conduct
    trap = getattr(scene.proxy, fault)(outbox._RECORD)
    await add_numbered(scene.connection, 30)
    running = await scene.worker()
    await until_statuses(scene.connection, accepted=20, rejected=10)

    assert trap.sprung == 1
    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)
