"""Claims that begin where the last survey found the first message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from dispatcher.db import outbox
from tests.builders import SERVICE, add_message, add_messages, add_service
from tests.integration.peers import Connection, Peer, peer

NOW = datetime.now(UTC)


@pytest.fixture
async def worker(database: str) -> AsyncIterator[Peer]:
    """A worker within its lease."""
    async with peer(database) as entered:
        yield entered


async def _heads(worker: Peer) -> dict[int, dict[int, outbox.Head]]:
    return {found.service_id: found.heads for found in await worker.waiting()}


async def _claim(worker: Peer, heads: dict[int, dict[int, outbox.Head]]) -> list[int]:
    claim = await outbox.claim(worker.session, worker.worker_id, {SERVICE: 10}, heads=heads)
    return [row["id"] for row in claim.sending]


async def test_all_that_a_survey_saw_is_claimed_from_its_heads(
    connection: Connection, worker: Peer
) -> None:
    """Of each priority, messages of one transaction and those after it are claimed, in order."""
    await add_service(connection)
    together = await add_messages(connection, 3, send_after=NOW)
    urgent = await add_message(connection, priority=5)
    later = await add_message(connection)
    await worker.claim(0)

    assert await _claim(worker, await _heads(worker)) == [urgent, *together, later]


async def test_what_comes_before_a_head_waits_for_the_next_survey(
    connection: Connection, worker: Peer
) -> None:
    """A message due before the head is left by the claim and found by the next survey."""
    await add_service(connection)
    first = await add_message(connection, send_after=NOW)
    await worker.claim(0)
    heads = await _heads(worker)
    late = await add_message(connection, send_after=NOW - timedelta(minutes=1))

    assert await _claim(worker, heads) == [first]
    assert await _claim(worker, await _heads(worker)) == [late]


async def test_a_priority_that_no_survey_saw_is_claimed_at_once(
    connection: Connection, worker: Peer
) -> None:
    """An urgent message, the first of its priority, does not wait for a survey."""
    await add_service(connection)
    await add_message(connection)
    await worker.claim(0)
    heads = await _heads(worker)
    urgent = await add_message(connection, priority=9, send_after=NOW - timedelta(days=1))

    assert (await _claim(worker, heads))[0] == urgent


async def test_a_head_without_a_beginning(connection: Connection, worker: Peer) -> None:
    """A message due since ever is claimed from a head that says so."""
    await add_service(connection)
    (ever,) = await worker.session.fetch(
        "INSERT INTO outbox (service_id, msisdn, text, send_after)"
        " VALUES (42, '359881234567', 'Now', '-infinity') RETURNING id"
    )
    await worker.claim(0)

    assert await _claim(worker, await _heads(worker)) == [ever["id"]]


async def test_what_a_claim_tells_of_itself_leads_to_the_next(
    connection: Connection, worker: Peer
) -> None:
    """Claims that each begin where the one before ended bring every message once, in order."""
    await add_service(connection)
    plain = [*await add_messages(connection, 5, send_after=NOW), await add_message(connection)]
    urgent = await add_messages(connection, 4, priority=5)
    await worker.claim(0)
    heads = await _heads(worker)

    claimed = []
    for _ in range(4):
        claim = await outbox.claim(worker.session, worker.worker_id, {SERVICE: 3}, heads=heads)
        claimed += [row["id"] for row in claim.sending]
        if len(claim.sending) == 3:
            heads[SERVICE] |= outbox.heads_in(claim.services[0])
    assert claimed == [*urgent, *plain]
