"""The database did what it was asked, and nobody heard it say so."""

from __future__ import annotations

import pytest

from dispatcher.db import outbox
from tests.e2e.harness import statuses, until_statuses, wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.provider import Entry, Provider, accept, refuse
from tests.faults.proxy import Trap
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
    running = await scene.worker(lease=1)
    await _send_five(scene)
    held = scene.proxy.hold(outbox._CLAIM)
    await add_numbered(scene.connection, 30, first=6)
    await held.caught()
    if leaves:
        await running.event("database.lost")
        assert await running.stop() == 0
    else:
        await until_statuses(scene.connection, accepted=35)
        await add_numbered(scene.connection, 30, first=36)
    await _run(scene, held, "claim")
    if leaves:
        assert await statuses(scene.connection) == {"accepted": 5, "pending": 30}
        running = await scene.worker(lease=1)
    await until_statuses(scene.connection, accepted=35 if leaves else 65)

    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, *scene.workers)


@pytest.mark.faults
async def test_record_that_comes_late(scene: Scene) -> None:
    """Results that are written long after they were written again change nothing."""
    answers = iter([refuse("LIMIT_DELAY")] * 5)

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        await next(answers, accept)(provider, request, entry)

    scene.provider.conduct = conduct
    running = await scene.worker()
    await _send_five(scene)
    held = scene.proxy.hold(outbox._RECORD)
    await add_numbered(scene.connection, 5, first=6)
    await held.caught()
    await until_statuses(scene.connection, accepted=10)
    await _run(scene, held, "record")
    await add_numbered(scene.connection, 5, first=11)
    await until_statuses(scene.connection, accepted=15)

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


async def _send_five(scene: Scene) -> None:
    """Have all statements prepared: one that is held before ends by the server's timeout."""
    await add_numbered(scene.connection, 5)
    await until_statuses(scene.connection, accepted=5)


async def _run(scene: Scene, held: Trap, part: str) -> None:
    """Have a statement run that was kept back until its client gave it up."""
    before = await _sessions(scene, part)

    async def ended() -> bool:
        return not before <= await _sessions(scene, part)

    held.lift()
    await wait_for(ended, "its session ends, and it has run before")


async def _sessions(scene: Scene, part: str) -> set[int]:
    rows = await scene.connection.fetch(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = $1 AND datname = current_database()",
        f"dispatcher {part}",
    )
    return {row["pid"] for row in rows}
