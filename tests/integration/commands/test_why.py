from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.domain.outcomes import doubt, never_left
from tests.builders import NUMBER, TEXT, add_message, add_messages, add_service
from tests.integration.commands.conftest import Command
from tests.integration.peers import Connection, midweek, peer

HOUR = timedelta(hours=1)


async def story(command: Command, number: int) -> dict[str, Any]:
    """What --json tells of a message."""
    told: dict[str, Any] = (await command("why", number, "--json")).json
    return told


def reasons(told: dict[str, Any]) -> list[str]:
    """What holds a message."""
    return [hold["reason"] for hold in told["holds"]]


async def test_unknown_message(command: Command) -> None:
    """A message that is not there is named."""
    done = await command("why", 7)

    assert (done.code, done.out) == (1, "")
    assert done.err == "There is no message 7; it may have been pruned.\n"


async def test_nothing_holds_it(command: Command, connection: Connection, database: str) -> None:
    """A message that is due where a worker is alive goes with the next claim."""
    await add_service(connection)
    number = await add_message(connection)

    async with peer(database):
        told = await story(command, number)
        shown = (await command("why", number)).out

    assert told["holds"] == []
    assert told["earliest"] == told["now"]
    assert "Nothing holds it; it goes with the next claim." in shown


async def test_no_text_and_no_number(command: Command, connection: Connection) -> None:
    """The story has neither the text nor the whole number."""
    await add_service(connection)
    number = await add_message(connection)

    shown = await command("why", number)
    told = await command("why", number, "--json")

    for out in (shown.out, told.out):
        assert TEXT not in out
        assert NUMBER not in out
    assert told.json["msisdn"] == "35988***4567"
    assert told.json["characters"] == len(TEXT)
    assert "35988***4567, 21 characters" in shown.out


async def test_everything_that_holds(
    command: Command, connection: Connection, database: str
) -> None:
    """All that keeps a message is told, and its earliest time is the latest of their ends."""
    await add_service(connection)
    await connection.execute(
        "UPDATE service SET blocked_until = now() + interval '1 h', "
        "blocked_reason = 'SERVICE_DISABLED'"
    )
    ends = datetime.now(UTC) + 3 * HOUR
    number = await add_message(connection, send_after=ends, retry_at=ends - HOUR)

    async with peer(database):
        await connection.execute(
            "UPDATE egress SET banned_until = now() + interval '2 h', ban_wait = '1 h'"
        )
        told = await story(command, number)
        shown = (await command("why", number)).out

    assert reasons(told) == [
        "It is not to go before its send_after.",
        "It waits after a request that failed.",
        "Service 42 is blocked (SERVICE_DISABLED); then one message tries.",
        "Egress default is banned by the provider; then one message tries.",
    ]
    assert told["earliest"] == ends.isoformat().replace("+00:00", "Z")
    assert "It goes at " in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE service SET paused = true", "Service 42 is paused; 'dispatcher service resume "),
        ("UPDATE worker SET lease_until = now()", "No worker is alive; start one with"),
        (
            "UPDATE outbox SET expires_at = now()",
            "Its expires_at has passed; it goes no more and will be expired",
        ),
    ],
)
async def test_somebody_has_to_act(
    command: Command, connection: Connection, database: str, change: str, reason: str
) -> None:
    """Where only somebody's action helps, no earliest time is told."""
    await add_service(connection)
    number = await add_message(connection)

    async with peer(database):
        await connection.execute(change)
        told = await story(command, number)
        shown = (await command("why", number)).out

    (only,) = reasons(told)
    assert only.startswith(reason)
    assert told["earliest"] is None
    assert "It does not go before somebody acts." in shown


async def test_one_open_egress_is_enough(
    command: Command, connection: Connection, database: str
) -> None:
    """A message waits for an egress only if no other is open to it where a worker is alive."""
    await add_service(connection)
    number = await add_message(connection)

    async with peer(database, egress="a"), peer(database, egress="b"):
        await connection.execute(
            "UPDATE egress SET ill_until = now() + interval '1 h', ill_wait = '1 h' "
            "WHERE name = 'a'"
        )
        assert reasons(await story(command, number)) == []
        await connection.execute(
            "INSERT INTO egress_service (egress, service_id, blocked_until, blocked_reason) "
            "VALUES ('b', 42, now() + interval '30 min', 'INVALID_IP')"
        )
        assert reasons(await story(command, number)) == [
            "Egress b may not use the service (INVALID_IP); then one message tries."
        ]
        await connection.execute("UPDATE egress_service SET blocked_until = now() + interval '2 h'")
        assert reasons(await story(command, number)) == [
            "Egress a waits, for the provider is ill; then one message tries."
        ]


async def test_quota(command: Command, connection: Connection, database: str) -> None:
    """A spent window holds a message until the next one begins, in the service's zone."""
    await add_service(connection, day_limit=2, week_limit=9, timezone=midweek())
    await add_messages(connection, 2)
    second, third = await add_messages(connection, 2)

    async with peer(database) as worker:
        await worker.claim(1)
        (left,) = (await story(command, third))["holds"][:1]
        await worker.claim(1)
        told = await story(command, second)
        (window,) = told["holds"][:1]
        await connection.execute(
            "UPDATE quota_usage SET closed_until = now() + interval '1 h' WHERE period = 'week'"
        )
        closed = await story(command, second)

    # It is noon there.
    assert left["reason"] == "The messages before it use up what is left of the day (1)."
    assert window["reason"] == "The limit of the day is used up (2 of 2)."
    assert told["earliest"] == left["until"] == window["until"]
    until = datetime.fromisoformat(window["until"]) - datetime.fromisoformat(told["now"])
    assert timedelta(hours=11) < until < timedelta(hours=13)
    assert "The provider says that the limit of the week is used up." in reasons(closed)


async def test_turn(command: Command, connection: Connection, database: str) -> None:
    """The messages that go before one are counted, and with a pace they take their time."""
    await add_service(connection)
    late, *_ = await add_messages(connection, 6)
    await connection.execute(
        "UPDATE outbox SET send_after = send_after + interval '1 ms' WHERE id = $1", late
    )
    await add_message(connection, priority=-1)
    await add_message(connection, send_after=datetime.now(UTC) + HOUR, priority=9)

    async with peer(database):
        told = await story(command, late)
        await connection.execute("UPDATE service SET min_delay = '10 s'")
        paced = await story(command, late)

    assert reasons(told) == ["Before it go 5 of its service."]
    assert told["earliest"] == told["now"]
    assert reasons(paced) == ["Before it go 5 of its service, one each 10 s."]
    wait = datetime.fromisoformat(paced["earliest"]) - datetime.fromisoformat(paced["now"])
    assert wait == timedelta(seconds=50)


async def test_never(command: Command, connection: Connection, database: str) -> None:
    """A message that is to go at the end of all times is told so."""
    await add_service(connection)
    await connection.execute(
        "INSERT INTO outbox (id, service_id, msisdn, text, send_after, created_at, expires_at) "
        "VALUES (1, 42, '359881234567', 'Hi', 'infinity', '-infinity', 'infinity')"
    )

    async with peer(database):
        told = await story(command, 1)
        shown = (await command("why", 1)).out

    assert (told["earliest"], told["created_at"]) == ("infinity", "-infinity")
    assert "It goes at infinity at the earliest." in shown


async def test_it_expires_before(command: Command, connection: Connection, database: str) -> None:
    """A message that will expire before it can go is told so."""
    await add_service(connection)
    soon = datetime.now(UTC) + HOUR
    number = await add_message(connection, send_after=soon + HOUR, expires_at=soon)

    async with peer(database):
        assert "It expires before that." in (await command("why", number)).out


async def test_history(command: Command, connection: Connection, database: str) -> None:
    """Requests, answers and reports are told in their order."""
    await add_service(connection, on_unknown="retry", name="Invoices")
    number = await add_message(connection, batch="may", priority=2)
    async with peer(database) as worker:
        await worker.record((await worker.claim()).sending, doubt("connection reset"))
        await connection.execute("UPDATE outbox SET status = 'pending'")
        await worker.record((await worker.claim()).sending, b"MSG_OK:abc")
    await connection.execute(
        "INSERT INTO delivery_report (provider_id, status, message_id, params) VALUES "
        """('abc', 'enroute', $1, '{"status": "SENT"}'), """
        """('abc', NULL, $1, '{"status": "MAYBE"}')""",
        number,
    )
    await connection.execute("UPDATE outbox SET status = 'enroute'")

    told = await story(command, number)
    shown = (await command("why", number)).out

    assert [(row["outcome"], row["reply"]) for row in told["requests"]] == [
        ("unknown", None),
        ("accepted", "MSG_OK:abc"),
    ]
    assert [(row["status"], row["word"]) for row in told["reports"]] == [
        ("enroute", "SENT"),
        (None, "MAYBE"),
    ]
    for words in ("Message 1 is enroute", "42 Invoices", "MSG_OK:abc", "not known", "MAYBE", "may"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


async def test_advice(command: Command, connection: Connection, database: str) -> None:
    """Each status comes with what it means and what can be done."""
    await add_service(connection)
    number = await add_message(connection)

    async def advice() -> str | None:
        told: str | None = (await story(command, number))["advice"]
        return told

    assert await advice() is None
    async with peer(database) as worker:
        claim = await worker.claim()
        assert await advice() == f"Worker {worker.worker_id} has it; a request may have left."
        await connection.execute("UPDATE worker SET lease_until = now()")
        assert await advice() == "Its worker is silent; another one sees to it soon."
        await worker.record(claim.sending, doubt("connection reset"))
    assert await advice() == (
        f"It may have been sent: 'dispatcher resolve --id {number}' with --sent if it was, with "
        "--resend if not."
    )
    await connection.execute("UPDATE service SET on_unknown = 'retry'")
    assert await advice() == "It may have been sent; its service wants it sent again, soon."
    for status, extended, expected in (
        ("rejected", True, f"'dispatcher retry --id {number}' sends it again, once it is put "),
        ("expired", True, f"'dispatcher retry --id {number}' sends it again, once it is put "),
        ("accepted", True, "The provider has it; what became of it is not reported yet."),
        ("accepted", False, "The provider has it; no delivery reports were asked for."),
    ):
        assert (await advice() or "nothing") in " ".join((await command("why", number)).out.split())
        await connection.execute("UPDATE outbox SET status = $1, extended = $2", status, extended)
        assert (await advice() or "").startswith(expected)


async def test_failed_request(command: Command, connection: Connection, database: str) -> None:
    """A request that never left is no request; its reason is the message's error."""
    await add_service(connection)
    number = await add_message(connection)
    async with peer(database) as worker:
        await worker.record(
            (await worker.claim()).sending, never_left("refused"), retry_in=60, failed=True
        )
        told = await story(command, number)

    assert told["requests"] == []
    assert told["error"] == "The request did not leave (refused); it is tried again."
    assert reasons(told) == ["It waits after a request that failed."]
