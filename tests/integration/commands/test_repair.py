from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from dispatcher.commands.repair import NAMED
from dispatcher.db.repair import BATCH
from dispatcher.domain.outcomes import RELEASED, doubt
from tests.builders import NUMBER, SERVICE, add_message, add_messages, add_service
from tests.integration.commands.conftest import Command, Outcome, rows
from tests.integration.peers import Connection, Peer, message, peer, statuses, used, wait_for

DOUBT = doubt("connection reset")
HOUR = timedelta(hours=1)


@pytest.fixture
async def worker(database: str, connection: Connection) -> AsyncIterator[Peer]:
    """A worker that is alive, and a service to claim from."""
    await add_service(connection)
    async with peer(database) as entered:
        yield entered


async def in_doubt(connection: Connection, worker: Peer, count: int = 1) -> list[int]:
    """Messages that a living worker has recorded as in doubt, and let go."""
    ids = await add_messages(connection, count)
    claim = await worker.claim(count)
    await worker.record(claim.sending, DOUBT)
    return ids


async def stranded(connection: Connection, worker: Peer) -> int:
    """A message in doubt whose worker has not settled it and is taken for dead."""
    number = await add_message(connection)
    await worker.claim()
    await connection.execute("UPDATE outbox SET status = 'unknown' WHERE id = $1", number)
    await connection.execute("UPDATE worker SET lease_until = now() - interval '1 s'")
    return number


async def notified(connection: Connection) -> asyncio.Queue[str]:
    """What the workers are told from now on."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener("dispatcher", lambda *event: heard.put_nowait(event[3]))
    return heard


async def told(heard: asyncio.Queue[str]) -> str:
    """The next thing that the workers are told."""
    async with asyncio.timeout(30):
        return await heard.get()


# ------------------------------------------------------------------------------------- resolve


async def test_nothing_in_doubt(command: Command) -> None:
    """Where nothing is in doubt the list says so."""
    assert (await command("resolve")).out == "Nothing is in doubt.\n"
    assert (await command("resolve", "--json")).json == []


async def test_list_of_doubts(command: Command, connection: Connection, worker: Peer) -> None:
    """What is in doubt is listed with why and since when, the oldest first, numbers masked."""
    first, second = await in_doubt(connection, worker, 2)
    held = await stranded(connection, worker)
    await connection.execute("UPDATE worker SET lease_until = now() + interval '1 h'")
    await connection.execute(
        "UPDATE outbox SET status_at = now() - interval '2 h' WHERE id = $1", second
    )

    shown = await command("resolve")
    listed = (await command("resolve", "--json")).json

    assert [row["id"] for row in listed] == [second, first, held]
    assert [row["held_by"] for row in listed] == [None, None, worker.worker_id]
    assert {row["msisdn"] for row in listed} == {"35988***4567", "35988***4568"}
    assert listed[0]["error"].startswith("connection reset")
    assert "2 h" in shown.out
    assert f"Worker {worker.worker_id} may still" in shown.out
    assert NUMBER not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


async def test_long_list_of_doubts(command: Command, connection: Connection, worker: Peer) -> None:
    """Of a long list the oldest are shown and the rest are counted."""
    ids = await in_doubt(connection, worker, NAMED + 5)

    assert "… and 5 more; --json lists all." in (await command("resolve")).out
    assert [row["id"] for row in (await command("resolve", "--json")).json] == ids


async def test_mark_as_sent(command: Command, connection: Connection, worker: Peer) -> None:
    """A message that was sent is accepted, keeps its quota, and is no longer its worker's."""
    number = await stranded(connection, worker)

    done = await command("resolve", "--sent", "--id", number, "--yes")

    assert (done.code, done.out) == (0, "1 message is marked as sent.\n")
    row = await message(connection, number)
    assert (row["status"], row["worker_id"], row["error"]) == ("accepted", None, None)
    assert row["accepted_at"] == row["status_at"] > row["created_at"]
    assert await used(connection) == (1, 1, 1)


async def test_send_again(command: Command, connection: Connection, worker: Peer) -> None:
    """A message that was not sent is claimed anew; both its requests stay counted."""
    number = await stranded(connection, worker)
    heard = await notified(connection)

    done = await command("resolve", "--resend", "--id", number, "--yes")

    assert (done.code, done.out) == (0, "1 message is pending again.\n")
    assert await told(heard) == "outbox"
    row = await message(connection, number)
    assert (row["status"], row["worker_id"], row["error"]) == ("pending", None, None)
    await connection.execute("UPDATE worker SET lease_until = now() + interval '1 h'")
    assert await worker.ids() == [number]
    assert await used(connection) == (2, 2, 2)


async def test_late_answer_after_it_was_resolved(
    command: Command, connection: Connection, worker: Peer
) -> None:
    """An answer that comes after a person has decided changes nothing."""
    number = await add_message(connection)
    claim = await worker.claim()
    await connection.execute("UPDATE outbox SET status = 'unknown'")
    await connection.execute("UPDATE worker SET lease_until = now() - interval '1 s'")

    await command("resolve", "--resend", "--id", number, "--yes")

    assert await worker.record(claim.sending, b"INVALID_MSISDN") == {}
    assert (await message(connection, number))["status"] == "pending"


@pytest.mark.parametrize("option", ["--sent", "--resend"])
async def test_not_while_its_worker_may_live(
    command: Command, connection: Connection, worker: Peer, option: str
) -> None:
    """What a living worker has not settled is left alone and named; the others are done."""
    held = await stranded(connection, worker)
    await connection.execute("UPDATE worker SET lease_until = now() + interval '1 h'")
    (settled,) = await in_doubt(connection, worker)

    done = await command("resolve", option, "--service", SERVICE, "--yes", "--json")
    again = await command("resolve", option, "--service", SERVICE, "--yes")

    assert done.code == 0
    reason = (
        f"Message {held} may still be held by worker {worker.worker_id}; stop it, or wait until "
        "its lease is over."
    )
    assert done.json == {
        "changed": 1,
        "before": {"unknown": 1},
        "refused": 1,
        "reasons": [{"id": held, "reason": reason}],
    }
    assert (await message(connection, held))["status"] == "unknown"
    assert (await message(connection, settled))["status"] != "unknown"
    assert (again.code, again.out, again.err) == (1, "Nothing is changed.\n", reason + "\n")


async def test_not_sent_again_when_it_is_too_late(
    command: Command, connection: Connection, worker: Peer
) -> None:
    """A message whose time is over is not made to wait for it, but can be marked as sent."""
    (number,) = await in_doubt(connection, worker)
    await connection.execute("UPDATE outbox SET expires_at = now() - interval '1 s'")

    again = await command("resolve", "--resend", "--id", number, "--yes")
    sent = await command("resolve", "--sent", "--id", number, "--yes")

    assert (again.code, sent.code) == (1, 0)
    assert again.err == f"Message {number} has expired; give it a later expires_at.\n"


async def test_both_ways_at_once(command: Command) -> None:
    """A message was either sent or not."""
    done = await command("resolve", "--sent", "--resend", "--id", 1, "--yes")

    assert (done.code, done.err) == (2, "Use --sent or --resend, not both.\n")


# --------------------------------------------------------------------------------------- retry


@pytest.mark.parametrize("status", ["rejected", "expired"])
async def test_retry(command: Command, connection: Connection, status: str) -> None:
    """What was rejected or expired goes again, with its number read anew."""
    await add_service(connection)
    number = await add_message(
        connection,
        status=status,
        error="x",
        failures=3,
        recipient="359888000000",
        msisdn="0881234567",
        cancel=True,
    )

    done = await command("retry", "--id", number, "--yes")

    assert (done.code, done.out) == (0, "1 message is pending again.\n")
    row = await message(connection, number)
    assert (row["status"], row["error"], row["failures"]) == ("pending", None, 0)
    assert (row["recipient"], row["cancel"]) == (None, False)
    assert row["status_at"] > row["created_at"]


async def test_retry_at_once(command: Command, connection: Connection, worker: Peer) -> None:
    """What waits after a failure goes at once, and what waits for nothing is left alone."""
    waiting, due = await add_messages(connection, 2)
    await connection.execute(
        "UPDATE outbox SET retry_at = now() + interval '1 h' WHERE id = $1", waiting
    )

    done = await command("retry", "--service", SERVICE, "--yes", "--json")
    named = await command("retry", "--id", due, "--yes")

    assert done.json["before"] == {"pending": 1}
    assert await worker.ids() == [waiting, due]
    assert named.code == 1
    assert (
        named.err == f"Message {due} waits for no retry; 'dispatcher why {due}' tells for what.\n"
    )


async def test_retry_of_what_has_ended_otherwise(command: Command, connection: Connection) -> None:
    """A message of another status is named with it, and one that is not there as well."""
    await add_service(connection)
    ended = await add_message(connection, status="delivered")
    wrong = await add_message(connection, status="rejected")

    done = await command("retry", "--id", ended, "--id", 99, "--id", wrong, "--yes")

    assert (done.code, done.out) == (0, "1 message is pending again.\n")
    assert done.err.splitlines() == [
        f"Message {ended} is delivered, and would have to be rejected or expired or pending.",
        "There is no message 99.",
    ]


async def test_filters_narrow(command: Command, connection: Connection) -> None:
    """Filters that are given together must all fit."""
    await add_service(connection)
    await add_service(connection, 43)
    old = datetime.now(UTC) - 3 * HOUR
    rejected = {"status": "rejected", "error": "x"}
    meant = await add_message(connection, batch="may", status_at=old, **rejected)
    others = [
        await add_message(connection, batch="june", status_at=old, **rejected),
        await add_message(connection, batch="may", **rejected),
        await add_message(connection, service_id=43, batch="may", status_at=old, **rejected),
    ]

    filters = ("--service", SERVICE, "--batch", "may", "--older-than", "2h")
    done = await command("retry", *filters, "--yes")
    unfit = await command("retry", *filters, "--id", others[0], "--yes")

    assert done.out == "1 message is pending again.\n"
    assert await rows(connection, "SELECT id FROM outbox WHERE status = 'pending'") == [(meant,)]
    assert unfit.err == f"Message {others[0]} does not fit the other options.\n"


# -------------------------------------------------------------------------------------- cancel


async def test_cancel_a_batch(command: Command, connection: Connection, worker: Peer) -> None:
    """Of a batch, what waits ends at once and what is claimed when it comes back unsent."""
    ids = await add_messages(connection, 5, batch="may")
    claim = await worker.claim(3)
    await worker.record(claim.sending[:1], DOUBT)
    other = await add_message(connection, batch="june")
    heard = await notified(connection)

    done = await command("cancel", "--batch", "may", "--yes")

    assert (done.code, done.out.splitlines()) == (
        0,
        [
            "2 messages cancelled.",
            "2 messages on the way: cancelled too, if the request has not left.",
            "1 message in doubt: not sent again by the program itself.",
        ],
    )
    assert await told(heard) == "cancel"
    assert await statuses(connection) == {
        "cancelled": 2,
        "sending": 2,
        "unknown": 1,
        "pending": 1,
    }
    await worker.record(claim.sending[1:2], RELEASED)
    await worker.record(claim.sending[2:], b"MSG_OK:x")
    assert await rows(connection, "SELECT id, status FROM outbox ORDER BY id") == [
        (ids[0], "unknown"),
        (ids[1], "cancelled"),
        (ids[2], "accepted"),
        (ids[3], "cancelled"),
        (ids[4], "cancelled"),
        (other, "pending"),
    ]


async def test_cancel_more_than_a_step(command: Command, connection: Connection) -> None:
    """A batch of any size is cancelled whole, in several transactions."""
    await add_service(connection)
    await connection.execute(
        "INSERT INTO outbox (service_id, msisdn, text, batch) "
        "SELECT $1, $2, 'Hi', 'may' FROM generate_series(1, $3)",
        SERVICE,
        NUMBER,
        2 * BATCH + 1,
    )

    done = await command("cancel", "--batch", "may", "--yes")

    assert done.out == f"{2 * BATCH + 1} messages cancelled.\n"
    assert await statuses(connection) == {"cancelled": 2 * BATCH + 1}


async def test_cancel_again(command: Command, connection: Connection) -> None:
    """What is cancelled already needs nothing more."""
    await add_service(connection)
    await add_message(connection, batch="may", status="cancelled")

    done = await command("cancel", "--batch", "may", "--yes")

    assert (done.code, done.out) == (0, "Nothing is changed.\n")


async def test_many_refused(command: Command, connection: Connection) -> None:
    """Of many messages that could not be changed the first are named."""
    await add_service(connection)
    ids = await add_messages(connection, NAMED + 3, status="delivered")

    done = await command("cancel", *(part for number in ids for part in ("--id", number)), "--yes")

    assert done.code == 1
    assert len(done.err.splitlines()) == NAMED + 1
    assert done.err.splitlines()[-1] == "… and 3 more"


async def test_deadlock_with_a_worker(
    command: Command, connection: Connection, database: str
) -> None:
    """A worker that locks the same messages in another order only delays a command."""
    await add_service(connection)
    first, second = await add_messages(connection, 2, batch="may")
    other = await asyncpg.connect(database)
    touch = "UPDATE outbox SET attempts = 1 WHERE id = $1"
    blocked = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = $1"
    name = await connection.fetchval("SELECT current_database()")

    # Whichever of the two is chosen to give way: the command must come to its end.
    async with asyncio.TaskGroup() as group:
        with suppress(asyncpg.DeadlockDetectedError):
            async with other.transaction():
                await other.execute(touch, second)
                done = group.create_task(command("cancel", "--batch", "may", "--yes"))
                await wait_for(lambda: connection.fetchval(blocked, name), "the command waits")
                await other.execute(touch, first)
    await other.close()

    assert await done == Outcome(0, "2 messages cancelled.\n", "")
    assert await statuses(connection) == {"cancelled": 2}


# ------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize(
    "arguments",
    [
        ("retry", "--yes"),
        ("cancel", "--yes"),
        ("resolve", "--sent", "--yes"),
        ("resolve", "--resend", "--yes"),
    ],
)
async def test_never_everything(command: Command, arguments: tuple[str, ...]) -> None:
    """Nothing is changed without saying which."""
    done = await command(*arguments)

    assert (done.code, done.out) == (2, "")
    assert done.err == "Say which: --id, --service, --batch or --older-than.\n"


async def test_nobody_to_answer(command: Command, connection: Connection) -> None:
    """Where nobody can answer the question, --yes is asked for and nothing is changed."""
    await add_service(connection)
    await add_message(connection)

    done = await command("cancel", "--service", SERVICE)

    assert (done.code, done.out) == (2, "")
    assert done.err == "It asks before it changes anything: add --yes where nobody can answer.\n"
    assert await statuses(connection) == {"pending": 1}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--older-than", "old"], "--older-than is wrong: it is no span of time such as 30m, "),
        (["--id", "-1"], "--id is wrong: there are no such numbers.\n"),
    ],
)
async def test_wrong_filters(command: Command, options: list[str], sentence: str) -> None:
    """A filter that cannot be read is named."""
    done = await command("cancel", *options, "--yes")

    assert done.code == 2
    assert done.err.startswith(sentence)


async def on_a_terminal(answer: str, *arguments: object) -> tuple[int, str]:
    """Runs a command on a terminal, answers its question, and returns its code and all it said."""
    ours, theirs = pty.openpty()
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", *map(str, arguments)),
        stdin=theirs,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    os.write(ours, f"{answer}\n".encode())
    out, _ = await running.communicate()
    os.close(ours)
    os.close(theirs)
    return running.returncode or 0, out.decode()


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("arguments", "status", "question"),
    [
        (("cancel",), "pending", "Cancel 2 messages (2 pending)? [y/N]: "),
        (("retry",), "rejected", "Send 2 messages again (2 rejected)? [y/N]: "),
        (("resolve", "--sent"), "unknown", "Mark 2 messages in doubt as sent? [y/N]: "),
        (
            ("resolve", "--resend"),
            "unknown",
            (
                "Send 2 messages in doubt again? What the provider has sent already is then sent "
                "twice. [y/N]: "
            ),
        ),
    ],
)
async def test_question(
    connection: Connection, arguments: tuple[str, ...], status: str, question: str
) -> None:
    """On a terminal a clear question comes first; without a yes nothing is changed."""
    await add_service(connection)
    await add_messages(connection, 2, status=status)

    code, said = await on_a_terminal("", *arguments, "--service", SERVICE)

    assert (code, said) == (1, f"{question}Nothing is changed.\n")
    assert await statuses(connection) == {status: 2}


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("answer", "status"), [("y", "cancelled"), ("n", "pending")])
async def test_answer(connection: Connection, answer: str, status: str) -> None:
    """A yes lets it happen, and a no does not."""
    await add_service(connection)
    await add_message(connection)

    code, _ = await on_a_terminal(answer, "cancel", "--service", SERVICE)

    assert code == (0 if answer == "y" else 1)
    assert await statuses(connection) == {status: 1}
