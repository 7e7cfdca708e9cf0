from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dispatcher.commands.status import document, screen
from dispatcher.db import overview
from dispatcher.db.pool import Session
from dispatcher.domain.outcomes import doubt
from dispatcher.embedded import EmbeddedPostgres
from tests.builders import NUMBER, SERVICE, add_message, add_messages, add_service
from tests.integration.commands.conftest import Command
from tests.integration.peers import Connection, midweek, peer

STATUSES = (
    "pending",
    "sending",
    "accepted",
    "enroute",
    "delivered",
    "undeliverable",
    "rejected",
    "expired",
    "cancelled",
    "unknown",
)


async def test_empty(command: Command) -> None:
    """Where there is nothing yet, what to do first is told."""
    shown = (await command("status")).out
    found = (await command("status", "--json")).json

    assert "The outbox is empty." in shown
    assert "There is no service yet" in shown
    assert "No worker is alive." in shown
    assert found["counts"] == dict.fromkeys(STATUSES, 0)
    assert (found["oldest_due_age"], found["services"], found["workers"]) == (None, [], [])


async def test_numbers(command: Command, connection: Connection, database: str) -> None:
    """Messages are counted by status, quotas with what is left, and what is due by its age."""
    await add_service(connection, name="Invoices", day_limit=10, month_limit=4, timezone=midweek())
    async with peer(database) as worker:
        await add_messages(connection, 4)
        claim = await worker.claim(4)
        await worker.record(claim.sending[:2])
        await worker.record(claim.sending[2:3], doubt("connection reset"))
        await add_messages(connection, 2)
        await connection.execute(
            "UPDATE outbox SET send_after = now() - interval '5 min' WHERE id = 5"
        )
        await connection.execute(
            "UPDATE outbox SET send_after = now() + interval '5 min' WHERE id = 6"
        )
        await connection.execute(
            "UPDATE outbox SET accepted_at = now() - interval '2 min' WHERE id = 1"
        )

        found = (await command("status", "--json")).json
        shown = (await command("status")).out

    assert found["counts"] == dict.fromkeys(STATUSES, 0) | {
        "pending": 2,
        "sending": 1,
        "accepted": 2,
        "unknown": 1,
    }
    assert (found["estimated"], found["due"], found["in_doubt"]) == (False, 1, 1)
    assert found["accepted_last_minute"] == 1
    assert 300 <= found["oldest_due_age"] < 400
    (service,) = found["services"]
    assert (service["pending"], service["due"], service["sending"]) == (2, 1, 1)
    assert [
        (window["period"], window["used"], window["limit"], window["left"])
        for window in service["quota"]
    ] == [("day", 4, 10, 6), ("week", 4, None, None), ("month", 4, 4, 0)]
    assert service["exhausted"]
    wait = datetime.fromisoformat(service["quota"][0]["next_window"]) - datetime.fromisoformat(
        found["now"]
    )
    assert timedelta(hours=11) < wait < timedelta(hours=13)
    (alive,) = found["workers"]
    assert (alive["id"], alive["holds"], alive["egress"]) == (worker.worker_id, 1, "default")
    for words in (
        "pending 2",
        "accepted 2",
        "in doubt 1",
        "1 due, the oldest for 5 min",
        "42 Invoices",
        "quota spent",
        "███░░░░░ 4/10 a day",
        "████████ 4/4 a month",
        "1 worker alive: 1 at test",
        "In doubt: 1; see 'dispatcher resolve'.",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


async def test_what_is_closed(command: Command, connection: Connection, database: str) -> None:
    """Pauses, blocks, bans and what the provider closed are told."""
    for service_id in (42, 43, 44, 45, 46):
        await add_service(connection, service_id, paused=service_id == 42)
    await connection.execute(
        "UPDATE service SET blocked_until = now(), blocked_reason = 'SERVICE_DISABLED' "
        "WHERE service_id = 43"
    )
    async with peer(database, egress="office") as worker:
        await connection.execute(
            "INSERT INTO egress_service (egress, service_id, blocked_until, blocked_reason) "
            "VALUES ('office', 44, now(), 'INVALID_IP')"
        )
        await worker.claim({45: 1})
        await connection.execute(
            "UPDATE quota_usage SET closed_until = now() + interval '1 h' WHERE period = 'week'"
        )
        await connection.execute(
            "UPDATE egress SET banned_until = now(), ban_wait = '1 min', ill_until = now(), "
            "ill_wait = '1 s'"
        )
        found = (await command("status", "--json")).json
        shown = (await command("status")).out

    services = {service["service_id"]: service for service in found["services"]}
    assert services[42]["paused"]
    assert services[43]["blocked_reason"] == "SERVICE_DISABLED"
    assert services[44]["blocked_at"][0]["egress"] == "office"
    assert [window["left"] for window in services[45]["quota"]] == [None, 0, None]
    assert [name for name, service in services.items() if service["exhausted"]] == [45]
    for words in (
        "paused",
        "blocked:",
        "SERVICE_DISABLED",
        "blocked at office:",
        "closed this week",
        "may send",
        "Egress office is banned by the provider; next probe ",
        "Egress office waits, for the provider is ill; next probe ",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


async def test_last_errors(command: Command, connection: Connection) -> None:
    """The last errors are shown newest first, with masked numbers and without texts."""
    await add_service(connection)
    for error in ("first", "second"):
        await add_message(connection, status="rejected", error=error, text="secret")
    await connection.execute(
        "UPDATE outbox SET status_at = now() - interval '1 h' WHERE error = 'first'"
    )

    found = (await command("status", "--json")).json
    shown = (await command("status")).out

    assert [error["error"] for error in found["last_errors"]] == ["second", "first"]
    assert {error["msisdn"] for error in found["last_errors"]} == {"35988***4567"}
    assert "35988***4567" in shown
    assert "1 h" in shown
    for hidden in (NUMBER, "secret"):
        assert hidden not in shown


async def test_nobody_works(command: Command, connection: Connection) -> None:
    """Where messages are due and no worker is alive, how to start one is told."""
    await add_service(connection)
    await add_message(connection)

    shown = (await command("status")).out

    assert "No worker is alive; start one with 'dispatcher run'." in shown


async def test_sample(
    connection: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large outbox a sample is counted, and what must be exact is exact all the same."""
    await add_service(connection)
    await connection.execute(
        "INSERT INTO outbox (service_id, msisdn, text, status) "
        "SELECT $1, $2, repeat('x', 100), CASE WHEN n % 100 = 0 THEN 'pending' "
        "ELSE 'delivered' END FROM generate_series(1, 20000) n",
        SERVICE,
        NUMBER,
    )
    pages = await connection.fetchval("SELECT pg_relation_size('outbox') / 8192")
    monkeypatch.setattr(overview, "PAGES", pages // 2)

    async with Session(database, name="test", timeout=30) as session:
        found = document(await overview.overview(session))

    assert found["estimated"]
    assert found["counts"]["pending"] == 200
    # Half of all pages, each drawn by chance: a tenth off would be twelve deviations.
    assert 17_800 < found["counts"]["delivered"] < 21_800
    assert screen(found) is not None


async def test_watch_on_a_terminal(connection: Connection, settings: Path) -> None:
    """The live screen follows what changes, and Ctrl-C ends it well."""
    await add_service(connection)
    ours, theirs = pty.openpty()
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "status", "--watch"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TERM": "xterm"},
    )
    os.close(theirs)
    screen_shown = _Screen(ours)

    await screen_shown.shows("The outbox is empty.")
    await add_messages(connection, 3)
    await screen_shown.shows("pending 3")
    running.send_signal(signal.SIGINT)

    assert await running.wait() == 0
    await screen_shown.ends()
    assert "Traceback" not in screen_shown.text


class _Screen:
    """What is written to a terminal."""

    def __init__(self, terminal: int) -> None:
        self.text = ""
        self._terminal = terminal
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        self._ended = False
        self._loop.add_reader(terminal, self._read)

    def _read(self) -> None:
        try:
            written = os.read(self._terminal, 65536)
        except OSError:  # what Linux says when the other end is closed
            written = b""
        self.text += written.decode(errors="replace")
        if not written:
            self._ended = True
            self._loop.remove_reader(self._terminal)
            os.close(self._terminal)
        self._more.set()

    async def shows(self, words: str) -> None:
        """Waits until some words are shown."""
        async with asyncio.timeout(60):
            while words not in self.text:
                await self._more.wait()
                self._more.clear()

    async def ends(self) -> None:
        """Waits for the end of all that is written."""
        async with asyncio.timeout(60):
            while not self._ended:
                await self._more.wait()
                self._more.clear()


async def test_watch_through_a_restart(durable_postgres: EmbeddedPostgres, settings: Path) -> None:
    """The screen outlives the database's absence, and tells of it."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "status", "--watch"),
        stdout=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "PYTHONUNBUFFERED": "1",
            "DATABASE_URL": durable_postgres.dsn,
        },
    )
    assert running.stdout is not None

    await _prints(running.stdout, b"The outbox is empty.")
    await asyncio.to_thread(durable_postgres.stop)
    await _prints(running.stdout, b"The database cannot be used")
    await asyncio.to_thread(durable_postgres.start)
    await _prints(running.stdout, b"The outbox is empty.")
    running.send_signal(signal.SIGINT)

    await running.communicate()
    assert running.returncode == 0


async def _prints(lines: asyncio.StreamReader, words: bytes) -> None:
    async with asyncio.timeout(60):
        while words not in (line := await lines.readline()):
            assert line, "it ended"


async def test_watch_or_json(command: Command) -> None:
    """A live screen is no JSON document."""
    done = await command("status", "--watch", "--json")

    assert (done.code, done.err) == (2, "Use --watch or --json, not both.\n")
