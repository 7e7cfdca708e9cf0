"""`dispatcher run` as a process, against the simulator in another."""

from __future__ import annotations

from tests.builders import add_message, add_service
from tests.e2e.harness import Connection, message, simulator, until_statuses, worker


async def test_insert_is_enough(database: str, connection: Connection) -> None:
    """A plain INSERT is sent once and comes out accepted, with its answer and its log line."""
    await add_service(connection)
    first = await add_message(connection)
    async with simulator() as provider, worker(database, provider.url) as running:
        await until_statuses(connection, accepted=1)
        row = await message(connection, first)
        told = await running.event("message.accepted", id=first)
        assert await running.stop() == 0

        received = await provider.received()

    assert received["requests"] == received["accepted"] == 1
    assert row["reply"] == f"MSG_OK:{row['provider_id']}"
    assert row["attempts"] == 1
    assert told["provider_id"] == row["provider_id"]
    assert told["msisdn"] == "35988***4567"
