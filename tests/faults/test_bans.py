"""Bans, under load and over restarts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.harness import until_statuses, wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.provider import Entry, Provider, accept, refuse
from tests.faults.texts import add_numbered
from tests.integration.wire.raw_provider import Received

banned = refuse("BAN_IP_TEMP")


async def test_probe_that_is_refused_for_itself(scene: Scene) -> None:
    """A probe answered by a refusal of its message ends the ban and blocks no service."""
    answers = iter([banned, refuse("INVALID_INPUT")])

    async def conduct(provider: Provider, request: Received, entry: Entry) -> None:
        await next(answers, accept)(provider, request, entry)

    scene.provider.conduct = conduct
    running = await scene.worker(concurrency=1, ban_backoff=0.2)
    await add_numbered(scene.connection, 5)
    await until_statuses(scene.connection, accepted=4, rejected=1)

    assert len(running.seen("egress.banned")) == len(running.seen("egress.resumed")) == 1
    assert not running.seen("service.blocked")
    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)


@pytest.mark.faults
async def test_hundred_in_flight_and_a_restart(scene: Scene) -> None:
    """A ban that meets 100 requests in flight is one ban; a restart in it probes once."""
    scene.provider.gate.clear()
    settings: dict[str, Any] = {
        "concurrency": 50,
        "ban_backoff": 2,
        "ban_backoff_max": 4,
        "lease": 3,
    }
    workers = [await scene.worker(**settings) for _ in range(2)]
    await add_numbered(scene.connection, 300)
    await scene.provider.came(100)
    scene.provider.conduct = banned
    scene.provider.gate.set()
    await until_statuses(scene.connection, pending=300)
    for worker in workers:
        assert await worker.stop() == 0
    came = len(scene.provider.entries)
    assert came == 100

    workers = [await scene.worker(**settings) for _ in range(2)]
    await scene.provider.came(came + 1)  # the probe; still banned
    scene.provider.conduct = accept
    scene.provider.gate.clear()
    await scene.provider.came(came + 2)  # the next one, alone until it is answered
    state = "SELECT ban_episode FROM egress WHERE banned_until IS NOT NULL"
    assert await scene.connection.fetchval(state) == 1
    assert len(scene.provider.entries) == came + 2
    scene.provider.gate.set()
    await until_statuses(scene.connection, accepted=300)

    async def resumed() -> bool:
        return any(worker.seen("egress.resumed") for worker in workers)

    await wait_for(resumed, "it resumed")
    for worker in workers:
        assert await worker.stop() == 0
    attempts = await scene.connection.fetchval("SELECT max(attempts) FROM outbox")
    assert attempts == 1, "a ban costs an attempt"
    await invariant.hold(scene.connection, scene.provider, *scene.workers)
