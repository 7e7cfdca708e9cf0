"""`dispatcher run` as a process, against the simulator in another: how messages go through."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from tests.builders import NUMBER, TEXT, add_message, add_messages, add_service
from tests.e2e.harness import (
    Connection,
    Event,
    message,
    midday,
    simulator,
    until_statuses,
    wait_for,
    worker,
)


async def test_insert_is_enough(database: str, connection: Connection) -> None:
    """A plain INSERT wakes the worker, is sent once and comes out accepted, with its log line."""
    await add_service(connection)
    # So long a poll shows that it is the insert that wakes it.
    async with simulator() as provider, worker(database, provider.url, poll_interval=3600) as run:
        await run.started()

        async def sleeps() -> bool:
            return bool(await connection.fetchval("SELECT bool_and(idle) FROM worker"))

        await wait_for(sleeps, "a worker that sleeps")
        first = await add_message(connection)
        told = await run.event("message.accepted", id=first)
        row = await message(connection, first)
        received = await provider.received()
        assert await run.stop() == 0

    assert row["status"] == "accepted"
    assert row["reply"] == f"MSG_OK:{row['provider_id']}"
    assert row["attempts"] == 1
    assert received["requests"] == received["accepted"] == 1
    assert (
        told.items()
        >= {
            "level": "info",
            "service_id": 42,
            "reply": row["reply"],
            "provider_id": row["provider_id"],
            "attempt": 1,
            "msisdn": "35988***4567",
        }.items()
    )
    assert told["latency_ms"] > 0


PLAIN, TEMPLATES, PAUSED, ABSURD = 1, 2, 3, 4
HOSTILE = "a&text=b\r\n#%00 +ж🙂"


async def test_what_becomes_of_each_message(database: str, connection: Connection) -> None:
    """Good and bad messages side by side: each ends as it must, and the log tells it once."""
    for service in (PLAIN, TEMPLATES, PAUSED, ABSURD):
        await add_service(connection, service, paused=service == PAUSED, timezone=midday())
    await connection.execute("UPDATE service SET min_delay = '300000 years' WHERE service_id = 4")
    soon = datetime.now(UTC) + timedelta(seconds=1)

    async def add(service_id: int = PLAIN, **columns: object) -> int:
        return await add_message(connection, service_id=service_id, **columns)

    ids = {
        "plain": await add(extended=False),
        "national": await add(msisdn="088 765 4321", text="national"),
        "hostile": await add(text=HOSTILE),
        "no number": await add(msisdn="secret words"),
        "empty": await add(text=""),
        "long": await add(text="ж" * 161),
        "foreign number": await add(msisdn="3598812345", text="foreign"),
        "template": await add(TEMPLATES, text="Hello"),
        "paused": await add(PAUSED, expires_at=soon),
        "absurd": await add(ABSURD),
    }
    services = [{"id": PLAIN}, {"id": TEMPLATES, "templates": ["Code [0-9]+"]}]

    async with (
        simulator(services=services) as provider,
        worker(database, provider.url) as run,
    ):
        await until_statuses(connection, accepted=3, rejected=5, expired=1, pending=1)
        await run.event("service.failed", service_id=ABSURD)
        received = {entry["text"]: entry for entry in await provider.messages()}
        assert await run.stop() == 0

    rows = {name: await message(connection, message_id) for name, message_id in ids.items()}
    expected = {
        "plain": ("accepted", "MSG_OK", 1),
        "national": ("accepted", f"MSG_OK:{rows['national']['provider_id']}", 1),
        "hostile": ("accepted", f"MSG_OK:{rows['hostile']['provider_id']}", 1),
        "no number": ("rejected", None, 0),
        "empty": ("rejected", None, 0),
        "long": ("rejected", None, 0),
        "foreign number": ("rejected", "INVALID_MSISDN", 1),
        "template": ("rejected", "INVALID_PATTERN", 1),
        "paused": ("expired", None, 0),
        "absurd": ("pending", None, 0),
    }
    assert {n: (r["status"], r["reply"], r["attempts"]) for n, r in rows.items()} == expected
    assert all(
        (row["error"] is None) == (row["status"] in {"accepted", "pending"})
        for row in rows.values()
    )
    assert len(received) == 5
    assert received["national"]["msisdn"] == "359887654321"
    assert received["national"]["extended"]
    assert rows["national"]["msisdn"] == "088 765 4321"
    assert HOSTILE in received
    check_log(run.events, ids, set(ids) - {"absurd"})


def check_log(events: list[Event], ids: dict[str, int], ended: set[str]) -> None:
    """One line per outcome, with every field that is promised, and nothing that is private."""
    outcomes = [event for event in events if event["event"].startswith("message.")]
    assert sorted(event["id"] for event in outcomes) == sorted(ids[name] for name in ended)
    for event in outcomes:
        assert event.keys() >= {
            *("timestamp", "level", "event"),
            *("id", "service_id", "reply", "provider_id", "attempt", "latency_ms"),
        }
    by_id = {event["id"]: event for event in outcomes}
    assert by_id[ids["template"]]["event"] == "message.rejected"
    assert by_id[ids["template"]]["latency_ms"] > 0
    assert by_id[ids["empty"]]["event"] == "message.rejected"
    assert by_id[ids["empty"]]["latency_ms"] is None
    assert by_id[ids["paused"]]["event"] == "message.expired"
    told = json.dumps(events, ensure_ascii=False)
    for private in (NUMBER, "359887654321", "088 765", "secret", "Hello", "text=b", TEXT):
        assert private not in told, private


async def test_priority_and_batch_of_many_services(database: str, connection: Connection) -> None:
    """A service with thousands of messages does not hold up one that has a few."""
    await add_service(connection, 1)
    await add_service(connection, 2)
    await connection.execute(
        "INSERT INTO outbox (service_id, msisdn, text) "
        "SELECT 1, (359880000000 + n)::text, 'x' FROM generate_series(1, 700) AS n"
    )
    await add_messages(connection, 20, service_id=2)
    urgent = await add_message(connection, service_id=1, priority=9, msisdn="359889999999")

    async with (
        simulator(faults={"latency": [0.01, 0.02]}) as provider,
        worker(database, provider.url, concurrency=10) as run,
    ):
        await until_statuses(connection, accepted=721)
        order = await provider.messages()
        assert await run.stop() == 0

    second = [n for n, entry in enumerate(order) if entry["service_id"] == "2"]
    assert len(second) == 20
    assert max(second) < 80
    first = [entry["msisdn"] for entry in order if entry["service_id"] == "1"]
    assert first.index("359889999999") == 0
    assert (await message(connection, urgent))["status"] == "accepted"
    assert len(order) == 721
