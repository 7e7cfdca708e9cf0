"""The whole worker in this process, where a test can disturb it: real database, real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import asyncpg
import pytest
import structlog

from dispatcher import rescuer, sender, worker
from dispatcher.app import App, DatabaseWatch
from dispatcher.db import egress, outbox, workers
from dispatcher.provider import Answer, NeverLeft, Provider, Reply
from dispatcher.settings import load
from dispatcher.simulator.config import Config, merge
from dispatcher.simulator.server import Simulator
from tests.builders import SERVICE, add_message, add_messages, add_service
from tests.integration.peers import (
    Connection,
    message,
    midweek,
    peer,
    statuses,
    used,
    wait_for,
)

DELAY = 0.15
"""Seconds between two messages of a paced service: long enough to do something in between."""


class Run:
    """A worker that runs, and what it has logged."""

    def __init__(self, app: App, events: list[Any]) -> None:
        self._app = app
        self._task = asyncio.create_task(app.run())
        self.events = events

    def seen(self, name: str) -> list[Mapping[str, Any]]:
        """The events of a name that came so far."""
        return [event for event in self.events if event["event"] == name]

    async def event(self, name: str, nth: int = 1) -> Mapping[str, Any]:
        """Wait for the nth event of a name."""

        async def come() -> list[Mapping[str, Any]] | None:
            found = self.seen(name)
            return found if len(found) >= nth else None

        found = await wait_for(come, name)
        assert found is not None
        return found[nth - 1]

    async def exited(self) -> int:
        """Wait until it has ended by itself; returns the exit code."""
        async with asyncio.timeout(30):
            return await self._task

    async def stop(self) -> int:
        """Tell it to stop; returns the exit code."""
        self._app._stop.set()
        return await self.exited()


@asynccontextmanager
async def provider(**config: object) -> AsyncIterator[Simulator]:
    """A provider in this process."""
    async with Simulator(merge(Config(), config)) as simulator:
        yield simulator


@asynccontextmanager
async def running(
    database: str, url: str, tmp_path: Path, *, told: str = "worker.started", **settings: Any
) -> AsyncIterator[Run]:
    """A worker in this process that has told something.

    `settings` are named as DISPATCHER_… in small letters.
    """
    chosen = load(
        database_url=database,
        provider_url=url,
        data_dir=tmp_path,
        http_port=0,
        **{"poll_interval": 0.05, "concurrency": 10, "lease": 10.0, "drain": 10, **settings},
    )
    with structlog.testing.capture_logs() as events:
        run = Run(App(chosen, database), events)
        try:
            await run.event(told)
            yield run
        finally:
            await run.stop()


@asynccontextmanager
async def cut_off(database: str, connection: Connection) -> AsyncIterator[None]:
    """No worker reaches the database meanwhile."""
    name = await connection.fetchval("SELECT current_database()")
    # Not by the test's connection: a session cannot shut the database that it is in.
    admin = await asyncpg.connect(database.replace(f"/{name}?", "/postgres?"))
    try:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = $1 AND application_name LIKE 'dispatcher%'",
            name,
        )
        yield
    finally:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await admin.close()


async def until(connection: Connection, **expected: int) -> None:
    """Wait until there are exactly so many messages of each status."""

    async def there() -> bool:
        return await statuses(connection) == expected

    await wait_for(there, f"the statuses {expected}")


async def test_claim_whose_answer_was_lost(
    database: str, connection: Connection, tmp_path: Path
) -> None:
    """What the database says we hold and we do not goes back, with its quota, and is sent once."""
    await add_service(connection, timezone=midweek())
    async with provider() as p, running(database, p.url, tmp_path, lease=1) as run:
        worker_id = (await run.event("worker.started"))["worker_id"]
        async with connection.transaction():
            await add_messages(connection, 5)
            await connection.execute(
                "UPDATE outbox SET status = 'sending', worker_id = $1, claim_no = claim_no + 1, "
                "claimed_at = clock_timestamp()",
                worker_id,
            )
            await connection.execute(
                "INSERT INTO quota_usage SELECT 42, p, date_trunc(p, now(), s.timezone), 5 "
                "FROM service s, unnest(ARRAY['day', 'week', 'month']) AS p"
            )
            await connection.execute("INSERT INTO pace VALUES (42)")

        told = await run.event("claim.returned")
        await until(connection, accepted=5)
        assert await run.stop() == 0

    assert told["messages"] == 5
    assert p.received()["requests"] == 5
    assert await used(connection) == (5, 5, 5)


async def test_worker_that_was_deleted(
    database: str, connection: Connection, tmp_path: Path
) -> None:
    """A worker that nobody knows any more ends with code 1, and records what was in flight."""
    await add_service(connection)
    async with (
        provider(faults={"latency": 0.3}) as p,
        running(database, p.url, tmp_path, lease=1) as run,
    ):
        await add_messages(connection, 3)

        async def in_flight() -> bool:
            return p.received()["requests"] == 3

        await wait_for(in_flight, "the requests")
        await connection.execute("DELETE FROM worker")
        code = await run.exited()

    assert code == 1
    assert run.seen("worker.failed")
    assert p.received()["repeated"] == 0
    assert set(await statuses(connection)) <= {"accepted", "unknown"}


async def test_code_that_fails_on_a_message(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages on which our own code fails are rejected in the end, and stop no other."""
    await add_service(connection, timezone=midweek())
    bad = [await add_message(connection, text="poison", priority=9) for _ in range(6)]
    await add_messages(connection, 5)
    send = Provider.send

    async def failing(self: Provider, **arguments: Any) -> Reply:
        if arguments["text"] == "poison":
            raise ZeroDivisionError("secret")
        return await send(self, **arguments)

    monkeypatch.setattr(Provider, "send", failing)
    monkeypatch.setattr(sender, "message_delay", lambda *_: 0.01)
    async with provider() as p, running(database, p.url, tmp_path) as run:
        await until(connection, accepted=5, rejected=6)
        assert await run.stop() == 0

    row = await message(connection, bad[0])
    assert (row["attempts"], row["reply"]) == (0, None)
    assert row["error"] == "The dispatcher itself failed on it (ZeroDivisionError); see its log."
    assert len(run.seen("message.failed")) == 6 * sender.POISONED
    assert not run.seen("provider.unreachable")
    assert await used(connection) == (5, 5, 5)


async def test_expiry_while_it_waits_for_its_slot(
    database: str, connection: Connection, tmp_path: Path
) -> None:
    """A message that runs out between its claim and its slot is expired, and costs nothing."""
    await add_service(connection, timezone=midweek())
    await connection.execute("UPDATE service SET min_delay = '100 ms'")
    async with provider() as p, running(database, p.url, tmp_path) as run:
        await connection.execute(
            "INSERT INTO pace (service_id, next_slot) VALUES (42, now() + interval '0.9 s')"
        )
        await connection.execute(
            "INSERT INTO outbox (service_id, msisdn, text, expires_at) "
            "VALUES (42, '359881234567', 'x', now() + interval '0.7 s')"
        )
        await until(connection, expired=1)
        assert await run.stop() == 0

    row = await connection.fetchrow("SELECT * FROM outbox")
    assert row is not None
    assert row["claim_no"] == 1
    assert (row["attempts"], row["error"]) == (0, "Its expires_at passed before it could be sent.")
    assert p.received()["requests"] == 0
    assert len(run.seen("message.expired")) == 1
    assert await used(connection) == (0, 0, 0)


async def test_frozen_past_its_lease(database: str, connection: Connection, tmp_path: Path) -> None:
    """A worker that was frozen past its lease sends nothing it held before, and then each once."""
    await add_service(connection, timezone=midweek())
    await connection.execute("UPDATE service SET min_delay = '150 ms'")
    async with provider() as p, running(database, p.url, tmp_path, lease=0.6) as run:
        await add_messages(connection, 12)

        async def holds_several() -> bool:
            return (await statuses(connection)).get("sending", 0) >= 3

        await wait_for(holds_several, "a claim")
        held = await connection.fetch("SELECT id, claim_no FROM outbox WHERE status = 'sending'")
        time.sleep(1)  # noqa: ASYNC251 - it is the freeze
        await until(connection, accepted=12)
        assert await run.stop() == 0

    claims = {row["id"]: row["claim_no"] for row in await connection.fetch("SELECT * FROM outbox")}
    assert any(claims[row["id"]] > row["claim_no"] for row in held)
    assert p.received()["requests"] == 12
    assert p.received()["repeated"] == 0
    assert await used(connection) == (12, 12, 12)


class Calls:
    """How often a function of a module was called, which does its work all the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
        self.count = 0
        self._name = name
        function = getattr(module, name)

        def counted(*args: Any, **named: Any) -> Any:
            self.count += 1
            return function(*args, **named)

        monkeypatch.setattr(module, name, counted)

    async def more(self, calls: int) -> None:
        """Wait until it was called so often again."""
        enough = self.count + calls

        async def came() -> bool:
            return self.count >= enough

        await wait_for(came, f"{calls} calls of {self._name}")


async def close_egress(connection: Connection) -> None:
    """The egress is banned, and a probe is due."""
    await connection.execute(
        "INSERT INTO egress (name, banned_until, ban_wait, ban_episode)"
        " VALUES ('default', now(), '1 s', 1)"
    )


async def test_no_probe_without_quota(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all that waits is out of quota no probe is taken, and one is as soon as it is not."""
    await add_service(connection, day_limit=0, timezone=midweek())
    await add_message(connection)
    await close_egress(connection)
    taken = Calls(monkeypatch, egress, "take_probe")
    looked = Calls(monkeypatch, outbox, "waiting")
    async with provider() as p, running(database, p.url, tmp_path) as run:
        await looked.more(4)
        assert taken.count == 0
        await connection.execute("UPDATE service SET day_limit = 1")
        await until(connection, accepted=1)
        assert await run.stop() == 0

    assert taken.count == len(run.seen("egress.probing")) == 1


async def test_no_probe_before_its_slot(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the pace of a service keeps its messages back, the probe waits for the slot."""
    await add_service(connection, min_delay=timedelta(hours=1))
    await add_message(connection)
    await close_egress(connection)
    await connection.execute(
        "INSERT INTO pace (service_id, next_slot) VALUES ($1, now() + interval '1 h')", SERVICE
    )
    taken = Calls(monkeypatch, egress, "take_probe")
    looked = Calls(monkeypatch, outbox, "waiting")
    async with provider() as p, running(database, p.url, tmp_path) as run:
        await taken.more(1)
        await looked.more(4)
        assert await run.stop() == 0

    assert taken.count == 1
    assert run.seen("egress.probing") == []


async def test_no_probe_of_what_cannot_be_claimed(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose rows make the claim fail is left alone while the egress is closed, too."""
    await add_service(connection)
    await connection.execute("UPDATE service SET min_delay = '300000 years'")
    await add_message(connection)
    await close_egress(connection)
    looked = Calls(monkeypatch, outbox, "waiting")
    async with provider() as p, running(database, p.url, tmp_path) as run:
        await run.event("service.failed")
        await looked.more(4)
        assert await run.stop() == 0

    assert len(run.seen("service.failed")) == 1


async def test_probe_without_a_message(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe for which every message is locked is put back unsaid, and taken when there is one."""
    returned = Calls(monkeypatch, egress, "return_probe")
    await add_service(connection)
    async with (
        provider() as p,
        running(database, p.url, tmp_path, ban_backoff=0.3) as run,
    ):
        p.set({"ban_now": 3600})
        await add_message(connection)
        await run.event("egress.banned")
        await until(connection, pending=1)
        locker = await asyncpg.connect(database)
        async with locker.transaction():
            await locker.execute("SELECT FROM outbox FOR UPDATE")
            await returned.more(2)
            assert run.seen("egress.probing") == []
            assert p.received()["requests"] == 1
            p.set({"unban": True})
        await locker.close()
        await run.event("egress.resumed")
        await until(connection, accepted=1)
        assert await run.stop() == 0

    assert len(run.seen("egress.probing")) == 1
    assert p.received()["requests"] == 2


async def test_probe_that_is_withheld_late(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe withheld after another worker's was answered by the ban leaves that its wait."""
    asked, thaw = asyncio.Event(), asyncio.Event()

    async def frozen(self: Provider, **arguments: Any) -> Reply:
        asked.set()
        await thaw.wait()
        return NeverLeft(sender.LEASE_LOST, withheld=True)

    monkeypatch.setattr(Provider, "send", frozen)
    returned = Calls(monkeypatch, egress, "return_probe")
    await add_service(connection)
    await add_message(connection)
    await close_egress(connection)
    async with running(database, "http://127.0.0.1:1/", tmp_path) as run, peer(database) as other:
        async with asyncio.timeout(30):
            await asked.wait()
        await connection.execute("UPDATE egress SET banned_until = now(), ban_wait = '30 min'")
        probe = await egress.take_probe(other.session, "default", 45)
        assert probe is not None
        assert await egress.probe_banned(other.session, "default", probe, 60, 3600, 1) is not None
        thaw.set()
        await returned.more(1)
        await until(connection, pending=1)
        assert await run.stop() == 0

    assert await connection.fetchval("SELECT banned_until > now() + interval '50 min' FROM egress")


async def test_probe_of_a_service_without_an_answer(
    database: str, connection: Connection, tmp_path: Path
) -> None:
    """A probe of a blocked service that brings no answer leaves the block, and another follows."""
    await add_service(connection)
    await add_messages(connection, 3)
    async with (
        provider(services=[{"id": 42, "disabled": True}]) as p,
        running(database, p.url, tmp_path, probe_interval=0.3, concurrency=1) as run,
    ):
        # The probe of a blocked service must not come again before a request can have ended.
        await connection.execute("UPDATE service SET blocked_until = NULL, blocked_reason = NULL")
        await run.event("service.blocked")
        # What was claimed before the block was durable has come back: the next is a probe.
        await until(connection, pending=3)
        p.set({"faults": {"drop": 1}, "services": [{"id": 42, "disabled": False}]})
        await run.event("message.unknown")
        assert await connection.fetchval("SELECT blocked_reason FROM service") == "SERVICE_DISABLED"
        p.set({"faults": {"drop": 0}})
        await run.event("service.resumed")
        await until(connection, accepted=2, unknown=1)
        assert await run.stop() == 0

    assert len(run.seen("service.probing")) >= 2


async def test_number_that_is_read_first(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number as people write it waits for no poll, though it is read before it is claimed."""
    # Falling idle, a worker looks at the outbox once more.
    monkeypatch.setattr(worker, "BUSY", 600.0)
    await add_service(connection)
    async with provider() as p, running(database, p.url, tmp_path, poll_interval=600) as run:
        idle = "SELECT idle FROM worker"
        await wait_for(lambda: connection.fetchval(idle), "a worker that waits for inserts")
        await add_message(connection, msisdn="0881234567")
        await until(connection, accepted=1)
        assert await run.stop() == 0


async def test_more_places_than_a_claim_brings(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with more places than one claim fills takes the rest without waiting for a poll."""
    # Falling idle, a worker looks at the outbox once more.
    monkeypatch.setattr(worker, "BUSY", 600.0)
    answer = asyncio.Event()

    async def answered(self: Provider, **arguments: Any) -> Reply:
        arguments["check"]()
        await answer.wait()
        return Answer(200, b"MSG_OK", 0.0)

    monkeypatch.setattr(Provider, "send", answered)
    more = outbox.AT_MOST + 100
    await add_service(connection)
    async with running(
        database, "http://127.0.0.1:1/", tmp_path, poll_interval=600, concurrency=more
    ) as run:
        idle = "SELECT idle FROM worker"
        await wait_for(lambda: connection.fetchval(idle), "a worker that waits for inserts")
        await connection.execute(
            "INSERT INTO outbox (service_id, msisdn, text)"
            " SELECT $1, '359881234567', 'x' FROM generate_series(1, $2::integer)",
            SERVICE,
            more,
        )
        await until(connection, sending=more)
        answer.set()
        await until(connection, accepted=more)
        assert await run.stop() == 0


async def test_probe_of_a_service_begins_with_what_makes_no_request(
    database: str, connection: Connection, tmp_path: Path
) -> None:
    """A probe passes what is refused, and waits for a number that is read first."""
    await add_service(connection)
    await connection.execute(
        "UPDATE service SET blocked_until = now(), blocked_reason = 'SERVICE_DISABLED'"
    )
    for msisdn in ("12", "0", "0881234567"):
        await add_message(connection, msisdn=msisdn)
    async with provider() as p, running(database, p.url, tmp_path, probe_interval=600) as run:
        await until(connection, accepted=1, rejected=2)
        assert await run.stop() == 0

    assert len(run.seen("service.probing")) == 1


async def test_database_is_cut_off(database: str, connection: Connection, tmp_path: Path) -> None:
    """Answers that come while the database is away are kept, and written when it is back."""
    await add_service(connection, timezone=midweek())
    async with (
        provider(faults={"latency": 0.2}) as p,
        running(database, p.url, tmp_path) as run,
    ):
        await add_messages(connection, 40)

        async def in_flight() -> bool:
            return p.received()["requests"] >= 10

        await wait_for(in_flight, "the requests")
        async with cut_off(database, connection):
            await run.event("database.lost")
            answered = p.received()["requests"]
        await run.event("database.back")
        await until(connection, accepted=40)
        assert await run.stop() == 0

    assert answered <= 2 * 10
    assert p.received()["requests"] == 40
    assert p.received()["repeated"] == 0
    assert await used(connection) == (40, 40, 40)


async def test_spooled_while_the_database_is_away(
    database: str, connection: Connection, tmp_path: Path
) -> None:
    """A worker that must stop while the database is away spools its answers for the next one."""
    await add_service(connection, timezone=midweek())
    async with provider(faults={"latency": 0.3}) as p:
        async with running(database, p.url, tmp_path, drain=1) as run:
            await add_messages(connection, 8)

            async def in_flight() -> bool:
                return p.received()["requests"] == 8

            await wait_for(in_flight, "the requests")
            async with cut_off(database, connection):
                assert await run.stop() == 0
                spooled = await run.event("spool.written")
        assert await statuses(connection) == {"sending": 8}

        async with running(database, p.url, tmp_path) as run:
            await run.event("spool.taken_up")
            await until(connection, accepted=8)
            assert await run.stop() == 0

    assert spooled["results"] == 8
    assert p.received()["requests"] == 8


LEASE = 300.0
"""Seconds; more than any test takes, so that none ends but by a clock of the test's own."""


class Losses:
    """Which parts of a worker find the database away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._parts: list[str] = []
        hear = DatabaseWatch._hear

        def overheard(watch: DatabaseWatch, part: str, loss: str | None) -> None:
            hear(watch, part, loss)
            if loss is not None:
                self._parts.append(part)

        monkeypatch.setattr(DatabaseWatch, "_hear", overheard)

    async def another(self, part: str) -> None:
        """Wait until a part finds it away, whether or not it has before."""
        self._parts.clear()

        async def found() -> bool:
            return part in self._parts

        await wait_for(found, f"the loss that '{part}' finds")


async def go_round(connection: Connection) -> None:
    """Wait until the rescuer has gone a whole round that began after this call."""
    for _ in range(2):
        # Its service is paused, so nobody but the rescuer ends it, and does so first in a round.
        late = await add_message(
            connection, service_id=SERVICE + 1, expires_at=datetime.now(UTC) - timedelta(hours=1)
        )

        async def ended(late: int = late) -> bool:
            return bool((await message(connection, late))["status"] == "expired")

        await wait_for(ended, "a round of the rescuer")


@pytest.mark.parametrize("runs_before", [True, False])
async def test_others_may_beat_after_an_outage(
    database: str,
    connection: Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    runs_before: bool,
) -> None:
    """Whose lease ran out while the database was away has a whole one from its return to beat."""
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(rescuer, "clock", SimpleNamespace(now=lambda: clock.time))
    monkeypatch.setattr(rescuer, "ROUND", 0.01)
    losses = Losses(monkeypatch)
    await add_service(connection)
    await add_service(connection, SERVICE + 1, paused=True)
    kept, lost = await add_messages(connection, 2)
    async with AsyncExitStack() as stack:
        beating = await stack.enter_async_context(peer(database))
        silent = await stack.enter_async_context(peer(database))
        rows = (await beating.claim(1)).sending
        await silent.claim(1)

        async def start(told: str) -> Run:
            return await stack.enter_async_context(
                running(database, "http://127.0.0.1:1/", tmp_path, told=told, lease=LEASE)
            )

        run = None
        if runs_before:
            run = await start("worker.started")
            await go_round(connection)
        async with cut_off(database, connection):
            if run is not None:
                await losses.another("rescue")
            clock.time += LEASE
            # Short, as the server of the tests has not run for a long one.
            await connection.execute(
                "UPDATE worker SET lease = '1 s', lease_until = clock_timestamp() "
                "WHERE host = 'test'"
            )
            if run is None:
                run = await start("database.lost")
            else:
                await losses.another("rescue")
        await run.event("worker.started")
        await run.event("database.back")
        for passing in (0, LEASE / 2, LEASE / 2 - 1):
            clock.time += passing
            await go_round(connection)
            assert not run.seen("worker.rescued")
        await connection.execute("UPDATE worker SET lease = '1 h' WHERE id = $1", beating.worker_id)
        await workers.beat(beating.session, beating.worker_id)
        clock.time += 1
        rescued = await run.event("worker.rescued")
        await go_round(connection)
        await beating.record(rows)

    assert [row["id"] for row in rows] == [kept]
    assert (rescued["worker_id"], rescued["messages"]) == (silent.worker_id, 1)
    assert len(run.seen("worker.rescued")) == 1
    assert (await message(connection, kept))["status"] == "accepted"
    assert (await message(connection, lost))["status"] == "unknown"


async def test_rescuer_that_stood_still(
    database: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a freeze of the rescuer, perhaps of all, others have a whole lease to beat."""
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(rescuer, "clock", SimpleNamespace(now=lambda: clock.time))
    monkeypatch.setattr(rescuer, "ROUND", 0.01)
    await add_service(connection)
    await add_service(connection, SERVICE + 1, paused=True)
    await add_message(connection)
    async with AsyncExitStack() as stack:
        silent = await stack.enter_async_context(peer(database))
        # Before there is a worker that would claim it.
        assert (await silent.claim(1)).sending
        run = await stack.enter_async_context(
            running(database, "http://127.0.0.1:1/", tmp_path, lease=LEASE)
        )
        await go_round(connection)
        clock.time += LEASE
        await go_round(connection)
        # Short, as the server of the tests has not run for a long one.
        await connection.execute(
            "UPDATE worker SET lease = '1 s', lease_until = clock_timestamp() WHERE host = 'test'"
        )
        for passing in (LEASE / 2, LEASE / 2 - 1):
            clock.time += passing
            await go_round(connection)
            assert not run.seen("worker.rescued")
        clock.time += 1
        rescued = await run.event("worker.rescued")

    assert rescued["worker_id"] == silent.worker_id


async def test_claims_do_not_pass_what_was_claimed(
    connection: Connection, database: str, tmp_path: Path
) -> None:
    """Beside an old snapshot, the last claim of a backlog looks at no more than the first."""
    await add_service(connection)
    await add_messages(connection, 1000)
    holder = await asyncpg.connect(database)
    try:
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT FROM service")
        async with (
            provider() as simulator,
            running(database, simulator.url, tmp_path, poll_interval=5.0),
        ):
            await until(connection, accepted=1000)
    finally:
        await holder.close()

    async def gone() -> bool:
        # A session tells what it read when it ends, at the latest.
        return not await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'dispatcher%' "
            "AND datname = current_database()"
        )

    await wait_for(gone, "the worker's sessions have ended")
    read = await connection.fetchval(
        "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'outbox_due'"
    )
    assert 1000 <= read < 10_000


async def test_a_message_that_commits_late_does_not_wait_for_the_backlog(
    connection: Connection, database: str, tmp_path: Path
) -> None:
    """Claims that go on where the last one ended come back for it within a second or so."""
    await add_service(connection)
    writer = await asyncpg.connect(database)
    try:
        transaction = writer.transaction()
        await transaction.start()
        late = await add_message(writer)
        await add_messages(connection, 400)
        async with (
            provider(faults={"latency": 0.05}) as simulator,
            running(database, simulator.url, tmp_path, poll_interval=60.0, concurrency=2),
        ):

            async def under_way() -> bool:
                return (await statuses(connection)).get("accepted", 0) > 20

            await wait_for(under_way, "it sends")
            await transaction.commit()

            async def sent() -> bool:
                return bool((await message(connection, late))["status"] == "accepted")

            await wait_for(sent, "the late one is sent")
            assert (await statuses(connection)).get("pending", 0) > 100
    finally:
        await writer.close()
