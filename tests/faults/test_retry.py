"""Services that would rather send twice than not at all: `on_unknown = 'retry'`."""

from __future__ import annotations

import pytest

from tests.e2e.harness import until_statuses, wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.provider import keep_silent
from tests.faults.texts import add_numbered


@pytest.fixture
async def retrying(scene: Scene) -> Scene:
    """A service whose messages in doubt go again."""
    await scene.connection.execute("UPDATE service SET on_unknown = 'retry'")
    return scene


async def test_after_a_death(retrying: Scene) -> None:
    """What a dead worker held goes again once, each request counted, and all is accepted."""
    retrying.provider.gate.clear()
    await add_numbered(retrying.connection, 10)
    doomed = await retrying.worker(lease=1, concurrency=5)
    await retrying.provider.came(5)
    await doomed.kill()
    retrying.provider.gate.set()
    heir = await retrying.worker(lease=1, unknown_retry_after=0.2)
    await until_statuses(retrying.connection, accepted=10)

    assert await heir.stop() == 0
    await invariant.hold(retrying.connection, retrying.provider, doomed, heir)
    again = await retrying.connection.fetchval("SELECT count(*) FROM outbox WHERE doubts = 1")
    assert again >= 5
    assert max(len(entries) for entries in retrying.provider.books.values()) == 2


@pytest.mark.faults
async def test_not_for_ever(retrying: Scene) -> None:
    """A message that is never answered for is asked for four times, then left to a person."""
    retrying.provider.conduct = keep_silent
    running = await retrying.worker(request_timeout=0.3, unknown_retry_after=0.1)
    await add_numbered(retrying.connection, 1)

    async def given_up() -> bool:
        left = "SELECT bool_and(status = 'unknown' AND doubts >= 3) FROM outbox"
        return bool(await retrying.connection.fetchval(left))

    await wait_for(given_up, "it is given up")
    # As many rounds again, in which the first would go again too.
    await add_numbered(retrying.connection, 1, first=2)
    await wait_for(given_up, "the second is given up")

    assert await running.stop() == 0
    assert [len(retrying.provider.books[number]) for number in (1, 2)] == [4, 4]
    await invariant.hold(retrying.connection, retrying.provider, running)
    assert await retrying.connection.fetchval("SELECT max(used) FROM quota_usage") == 8
