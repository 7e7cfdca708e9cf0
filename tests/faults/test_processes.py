"""Workers that are killed, frozen, and told twice to stop."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from random import Random
from signal import SIGCONT, SIGSTOP, SIGTERM
from typing import Any

import pytest

from dispatcher.db import outbox, workers
from tests.builders import add_service
from tests.e2e.harness import wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered

PACED = 43


async def test_killed_in_flight(scene: Scene) -> None:
    """A worker killed with requests in flight leaves at most those in doubt, and nothing else."""
    concurrency = 5
    scene.provider.gate.clear()
    await add_numbered(scene.connection, 40)
    doomed = await scene.worker(lease=1, concurrency=concurrency)
    await scene.provider.came(concurrency)
    await doomed.kill()
    scene.provider.gate.set()
    heir = await scene.worker(lease=1)
    await _all_settled(scene)

    assert await heir.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, doomed, heir)
    assert concurrency <= found["unknown"] <= 2 * concurrency
    assert found["accepted"] == 40 - found["unknown"]
    assert heir.seen("worker.rescued", messages=found["unknown"])


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2))
async def test_killed_at_any_moment(scene: Scene, seed: int) -> None:
    """Ten workers killed at random moments under load send nothing twice and lose nothing."""
    chance = Random(seed)
    await add_service(scene.connection, PACED, min_delay=timedelta(milliseconds=10))
    scene.provider.latency = 0.03
    concurrency, sent = 10, 0
    running = await scene.worker(lease=1, concurrency=concurrency)
    for _ in range(10):
        doomed = running
        running = await scene.worker(lease=1, concurrency=concurrency)
        came = len(scene.provider.entries)
        await add_numbered(scene.connection, 60, first=sent + 1)
        await add_numbered(scene.connection, 60, first=sent + 61, service_id=PACED)
        sent += 120
        await scene.provider.came(came + chance.randint(1, 30))
        await asyncio.sleep(chance.uniform(0, 0.05))
        await doomed.kill()
    await _all_settled(scene)

    assert await running.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *scene.workers)
    assert found["unknown"] <= 10 * 2 * concurrency
    assert found["accepted"] == sent - found["unknown"]


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.faults)])
@pytest.mark.timeout(600)
async def test_frozen_past_its_lease(scene: Scene, rounds: int) -> None:
    """A worker that was frozen sends nothing of what it held, and records what came meanwhile."""
    chance = Random(rounds)
    # Slots lie ahead for so long that some messages are held and have not left at any moment.
    await add_service(scene.connection, PACED, min_delay=timedelta(milliseconds=150))
    settings: dict[str, Any] = {"lease": 1, "concurrency": 5, "request_timeout": 60}
    frozen = await scene.worker(**settings)
    frozen_id = await frozen.started()
    other = await scene.worker(**settings)
    sent = 0
    for _ in range(rounds):
        scene.provider.gate.clear()
        came = len(scene.provider.entries)
        await add_numbered(scene.connection, 20, first=sent + 1)
        await add_numbered(scene.connection, 10, first=sent + 21, service_id=PACED)
        sent += 30
        await scene.provider.came(came + chance.randint(1, 8))
        await asyncio.sleep(chance.uniform(0, 0.1))
        frozen.signal(SIGSTOP)
        await _holds_nothing(scene, frozen_id)
        # What goes back must stay there, so that whatever leaves now is known for a second one.
        await scene.connection.execute("UPDATE service SET paused = true")
        scene.provider.gate.set()
        await wait_for(lambda: _none(scene, "sending"), "the other worker has done its work")
        came = len(scene.provider.entries)
        frozen.signal(SIGCONT)
        await wait_for(lambda: _none(scene, "sending", "unknown"), "late answers are recorded")
        assert len(scene.provider.entries) == came, "it sent what others may have taken"
        await scene.connection.execute("UPDATE service SET paused = false")
        await _all_settled(scene)

    assert await frozen.stop() == await other.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, frozen, other)
    assert found["accepted"] == sent


@pytest.mark.faults
async def test_beat_that_came_late(scene: Scene) -> None:
    """A beat that was asked in time and came too late does not cover what was held before it."""
    await add_service(scene.connection, PACED, min_delay=timedelta(milliseconds=300))
    scene.provider.gate.clear()
    settings: dict[str, Any] = {"concurrency": 5, "request_timeout": 60}
    late = await scene.worker(lease=6, **settings)
    late_id = await late.started()
    async with scene.connection.transaction():
        await add_numbered(scene.connection, 5)
        await add_numbered(scene.connection, 3, first=6, service_id=PACED)
    # All places are taken, so what waits for its slot is held and cannot leave.
    await scene.provider.came(5)
    await scene.connection.execute("UPDATE service SET paused = true")
    held_back = await scene.connection.fetchval(
        "SELECT count(*) - 5 FROM outbox WHERE status = 'sending'"
    )
    assert held_back > 0
    await scene.worker(lease=1, direct=True, **settings)
    lost = scene.proxy.lose(workers._BEAT, times=1000)

    async def ends_soon() -> bool:
        return bool(
            await scene.connection.fetchval(
                "SELECT lease_until - interval '1 s' < clock_timestamp() FROM worker WHERE id = $1",
                late_id,
            )
        )

    await wait_for(ends_soon, "its lease ends soon")
    lost.lift()
    held = scene.proxy.hold(workers._BEAT)
    await held.caught()
    await _holds_nothing(scene, late_id)
    held.lift()
    scene.provider.gate.set()
    await wait_for(lambda: _none(scene, "sending", "unknown"), "all is recorded")
    assert len(scene.provider.entries) == 5, "it sent what others had taken"
    await scene.connection.execute("UPDATE service SET paused = false")
    await _all_settled(scene)

    for worker in scene.workers:
        assert await worker.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *scene.workers)
    assert found["accepted"] == 8


@pytest.mark.faults
async def test_rescue_that_came_late(scene: Scene) -> None:
    """A rescue that was asked before the link froze, and comes after, buries nobody."""
    scene.provider.gate.clear()
    await add_numbered(scene.connection, 5)
    frozen = [await scene.worker(lease=1, request_timeout=60) for _ in range(2)]
    await scene.provider.came(5)

    async def all_went_round() -> bool:
        # One that is still being prepared would end by its timeout, on the server's side.
        return await _rescuers(scene, "%gone AS MATERIALIZED%") == await _rescuers(scene)

    await wait_for(all_went_round, "each has rescued once")
    held = scene.proxy.hold(outbox._RESCUE)
    silent = scene.proxy.hold(workers._BEAT, times=1000)
    await held.caught()
    rescuers = await _rescuers(scene)

    async def all_silent() -> bool:
        return bool(
            await scene.connection.fetchval(
                "SELECT bool_and(lease_until < clock_timestamp()) FROM worker"
            )
        )

    async def has_run() -> bool:
        # Its client gave it up, so its session ends with it.
        return not rescuers <= await _rescuers(scene)

    await wait_for(all_silent, "all leases run out")
    assert rescuers <= await _rescuers(scene)
    held.lift()
    await wait_for(has_run, "the rescue has run")
    assert await _none(scene, "unknown"), "it took what a worker may beat for again"
    silent.lift()
    scene.provider.gate.set()
    await _all_settled(scene)

    for worker in frozen:
        assert await worker.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, *frozen)
    assert found["accepted"] == 5


@pytest.mark.faults
async def test_told_twice_to_stop(scene: Scene) -> None:
    """A second signal ends a worker at once, and what it held is found in doubt."""
    scene.provider.gate.clear()
    await add_numbered(scene.connection, 10)
    stubborn = await scene.worker(lease=1, concurrency=5, drain=600)
    await scene.provider.came(5)
    stubborn.signal(SIGTERM)
    await stubborn.event("worker.stopping")
    assert await stubborn.stop() == 1
    scene.provider.gate.set()
    heir = await scene.worker(lease=1)
    await _all_settled(scene)

    assert await heir.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, stubborn, heir)
    assert found["unknown"] == 5


async def _rescuers(scene: Scene, last: str = "%") -> set[int]:
    rows = await scene.connection.fetch(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name = 'dispatcher rescue' AND datname = current_database()"
        " AND query LIKE $1",
        last,
    )
    return {row["pid"] for row in rows}


async def _none(scene: Scene, *statuses: str) -> bool:
    return not await scene.connection.fetchval(
        "SELECT EXISTS (SELECT FROM outbox WHERE status = ANY ($1))", statuses
    )


async def _all_settled(scene: Scene) -> None:
    await wait_for(lambda: _none(scene, "pending", "sending"), "all are sent", within=120)


async def _holds_nothing(scene: Scene, worker_id: int) -> None:
    async def there() -> bool:
        return bool(
            await scene.connection.fetchval(
                "SELECT NOT EXISTS (SELECT FROM outbox WHERE status = 'sending' AND worker_id = $1)"
                " AND (SELECT lease_until < clock_timestamp() FROM worker WHERE id = $1)",
                worker_id,
            )
        )

    await wait_for(there, "the frozen worker's messages are rescued")
