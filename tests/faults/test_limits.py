"""Limits that end in the middle of a batch, with several workers and a death among them."""

from __future__ import annotations

import asyncio

import pytest

from tests.builders import SERVICE
from tests.e2e.harness import wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.provider import Entry, Provider, accept, refuse
from tests.faults.texts import add_numbered
from tests.integration.peers import midweek
from tests.integration.wire.raw_provider import Received

LIMIT = 100


async def _limit(scene: Scene, **limits: int) -> None:
    for name, limit in limits.items():
        await scene.connection.execute(
            f"UPDATE service SET {name} = $1, timezone = $2",  # noqa: S608 - a column of ours
            limit,
            midweek(),
        )


async def _used(scene: Scene) -> int:
    """What the service's day has used, and nothing of it is still being sent."""
    sending = await scene.connection.fetchval(
        "SELECT count(*) FROM outbox WHERE status = 'sending'"
    )
    used: int | None = await scene.connection.fetchval(
        "SELECT max(used) FROM quota_usage WHERE service_id = $1 AND period = 'day'", SERVICE
    )
    return 0 if sending else used or 0


@pytest.mark.parametrize("killed", [False, True], ids=["living", "killed"])
@pytest.mark.parametrize("period", ["day", "week", "month"])
@pytest.mark.faults
async def test_our_own(scene: Scene, period: str, killed: bool) -> None:  # noqa: FBT001 - a case
    """Three workers use all of a limit and not one more, whatever is refused and who dies."""
    await _limit(scene, **{f"{period}_limit": LIMIT})

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        answer = refuse("INVALID_MSISDN") if entry.message % 7 == 0 else accept
        await answer(provider, request, entry)

    scene.provider.conduct = conduct
    scene.provider.latency = 0.02
    workers = [await scene.worker(lease=1, concurrency=10) for _ in range(3)]
    await add_numbered(scene.connection, 300)
    if killed:
        await scene.provider.came(30)
        await workers.pop().kill()

    async def spent() -> bool:
        return await _used(scene) == LIMIT

    await wait_for(spent, "the limit is used up")
    for worker in workers:
        await worker.event("quota.exhausted")
    # That nothing more comes is no condition: a few polls are what would bring it.
    await asyncio.sleep(0.5)
    for worker in workers:
        assert await worker.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *scene.workers)
    assert found["accepted"] + found["unknown"] == LIMIT
    assert bool(found["unknown"]) <= killed
    assert scene.provider.booked <= LIMIT


@pytest.mark.faults
async def test_the_providers_own(scene: Scene) -> None:
    """A limit that the provider says is used up stops all workers, and costs nothing."""
    await _limit(scene, day_limit=LIMIT)

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        answer = accept if provider.booked < 30 else refuse("LIMIT_DAY")
        await answer(provider, request, entry)

    scene.provider.conduct = conduct
    workers = [await scene.worker(concurrency=10) for _ in range(2)]
    await add_numbered(scene.connection, 200)

    async def closed() -> bool:
        return await _used(scene) == 30 and bool(
            await scene.connection.fetchval(
                "SELECT EXISTS (SELECT FROM quota_usage WHERE closed_until > now())"
            )
        )

    await wait_for(closed, "the window is closed")
    for worker in workers:
        assert await worker.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *workers)
    assert found == {"accepted": 30, "pending": 170}
    assert len(scene.provider.entries) <= 30 + 2 * 2 * 10
