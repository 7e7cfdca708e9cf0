import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from tests.builders import SERVICE, add_service
from tests.integration.commands.conftest import Command, rows
from tests.integration.peers import Connection

NOW = datetime.now(UTC)
LIMITS = ("day_limit", "week_limit", "month_limit")


async def test_add_with_everything(command: Command, connection: Connection) -> None:
    """A service is added as it was described."""
    done = await command(
        *("service", "add", SERVICE, "--user-id", 7, "--name", "Invoices"),
        *("--day-limit", 1000, "--week-limit", 5000, "--month-limit", 20000),
        *("--min-delay", "0.05", "--timezone", "Europe/Bucharest"),
        *("--pattern", "Invoice [0-9]+", "--pattern", "Hi", "--on-unknown", "retry"),
    )

    assert (done.code, done.out) == (0, "Service 42 is added.\n")
    row = await connection.fetchrow("SELECT * FROM service")
    assert row is not None
    assert dict(row) == {
        "service_id": SERVICE,
        "user_id": 7,
        "name": "Invoices",
        "day_limit": 1000,
        "week_limit": 5000,
        "month_limit": 20000,
        "min_delay": timedelta(milliseconds=50),
        "timezone": "Europe/Bucharest",
        "patterns": ["Invoice [0-9]+", "Hi"],
        "on_unknown": "retry",
        "paused": False,
        "blocked_until": None,
        "blocked_reason": None,
    }


async def test_clear_what_has_a_default(command: Command, connection: Connection) -> None:
    """'none' brings back what a service has that says nothing."""
    await add_service(connection)
    await connection.execute("UPDATE service SET timezone = 'UTC', on_unknown = 'retry'")

    done = await command("service", "set", SERVICE, "--timezone", "none", "--on-unknown", "none")

    assert done.code == 0
    row = await connection.fetchrow("SELECT timezone, on_unknown FROM service")
    assert row is not None
    assert tuple(row) == ("Europe/Sofia", "hold")


async def test_add_with_the_least(command: Command, connection: Connection) -> None:
    """What is not said of a new service is as the table has it by default."""
    assert (await command("service", "add", SERVICE, "--user-id", 7)).code == 0

    row = await connection.fetchrow("SELECT * FROM service")
    await connection.execute("DELETE FROM service")
    await add_service(connection)
    assert row == await connection.fetchrow("SELECT * FROM service")


async def test_add_what_exists(command: Command, connection: Connection) -> None:
    """A service that exists is left as it is."""
    await add_service(connection, name="old")

    done = await command("service", "add", SERVICE, "--user-id", 8, "--name", "new")

    assert (done.code, done.out) == (1, "")
    assert done.err == "Service 42 exists already; change it with 'dispatcher service set 42'.\n"
    assert await connection.fetchval("SELECT name FROM service") == "old"


async def test_set_changes_only_what_is_given(command: Command, connection: Connection) -> None:
    """A change leaves all else as it was."""
    await add_service(connection, name="Invoices", day_limit=5, patterns=["a"])

    done = await command("service", "set", SERVICE, "--day-limit", 6)

    assert (done.code, done.out) == (0, "Service 42 is changed.\n")
    assert await rows(connection, "SELECT name, day_limit, patterns, user_id FROM service") == [
        ("Invoices", 6, ["a"], 7)
    ]


async def test_none_clears(command: Command, connection: Connection) -> None:
    """The word 'none' takes away a limit, the delay, the patterns and the name."""
    await add_service(
        connection,
        name="Invoices",
        min_delay=timedelta(seconds=1),
        patterns=["a"],
        **dict.fromkeys(LIMITS, 5),
    )

    done = await command(
        *("service", "set", SERVICE, "--name", "none", "--pattern", "none"),
        *("--min-delay", "none", "--day-limit", "none"),
        *("--week-limit", "none", "--month-limit", "none"),
    )

    assert done.code == 0
    assert await rows(
        connection,
        "SELECT name, min_delay, patterns, day_limit, week_limit, month_limit FROM service",
    ) == [("", timedelta(), None, None, None, None)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--day-limit", "many"], "--day-limit must be a whole number, or 'none'."),
        (["--week-limit", "-1"], "--week-limit must be a whole number, or 'none'."),
        (["--month-limit", str(2**31)], "--month-limit must be a whole number, or 'none'."),
        (["--on-unknown", "guess"], "--on-unknown must be hold or retry."),
        (["--min-delay", "soon"], "--min-delay is wrong: it is no number of seconds"),
        (["--timezone", "Nowhere"], 'PostgreSQL does not know the time zone "Nowhere".'),
        (["--pattern", "("], 'The pattern "(" is not a regular expression: '),
        (["--pattern", "***=x"], 'The pattern "***=x" starts with an unsupported option.'),
        ([], "Say what to change, such as --day-limit 1000."),
    ],
)
async def test_wrong_values(
    command: Command, connection: Connection, options: list[str], sentence: str
) -> None:
    """A wrong value is told in one sentence, with exit code 2, and changes nothing."""
    await add_service(connection)
    before = await connection.fetch("SELECT * FROM service")

    done = await command("service", "set", SERVICE, *options)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(sentence)
    assert done.err.count("\n") == 1
    assert await connection.fetch("SELECT * FROM service") == before


@pytest.mark.parametrize("verb", ["pause", "resume", "set"])
async def test_unknown_service(command: Command, verb: str) -> None:
    """A service that nobody knows is named."""
    done = await command("service", verb, 44, *(["--name", "x"] if verb == "set" else []))

    assert (done.code, done.out) == (1, "")
    assert done.err == "There is no service 44; see 'dispatcher service list'.\n"


async def test_pause(command: Command, connection: Connection) -> None:
    """A paused service is marked so, and no other."""
    await add_service(connection)
    await add_service(connection, 43)

    assert (await command("service", "pause", SERVICE)).out == "Service 42 is paused.\n"

    rows = await connection.fetch("SELECT service_id FROM service WHERE paused")
    assert [row["service_id"] for row in rows] == [SERVICE]


async def test_resume_lifts_all_that_holds(command: Command, connection: Connection) -> None:
    """Resuming ends the pause, every block, and what the provider closed; it wakes workers."""
    await add_service(connection, paused=True)
    await add_service(connection, 43, paused=True)
    await connection.execute("UPDATE service SET blocked_until = now(), blocked_reason = 'x'")
    await connection.execute("INSERT INTO egress (name) VALUES ('a'), ('b')")
    await connection.execute(
        "INSERT INTO egress_service (egress, service_id, blocked_until, blocked_reason) "
        "SELECT e.name, service_id, now() + interval '1 h', 'INVALID_IP' FROM egress e, service"
    )
    await connection.execute(
        "INSERT INTO quota_usage (service_id, period, window_start, used, closed_until) "
        "SELECT service_id, 'day', now(), 5, now() + interval '1 h' FROM service"
    )
    heard: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener("dispatcher", lambda *event: heard.put_nowait(event[3]))

    assert (await command("service", "resume", SERVICE)).out == "Service 42 may send.\n"

    assert await rows(
        connection, "SELECT service_id FROM service WHERE paused OR blocked_until IS NOT NULL"
    ) == [(43,)]
    assert await rows(
        connection, "SELECT DISTINCT service_id FROM egress_service WHERE blocked_until IS NOT NULL"
    ) == [(43,)]
    assert await rows(
        connection, "SELECT service_id, used FROM quota_usage WHERE closed_until IS NOT NULL"
    ) == [(43, 5)]
    async with asyncio.timeout(30):
        assert await heard.get() == "service"


async def test_list(command: Command, connection: Connection) -> None:
    """The list shows each service's limits and what holds it, in 80 columns."""
    await add_service(connection, name="Invoices", day_limit=1000, month_limit=9000)
    await add_service(
        connection,
        43,
        name="A very long name of a service, which goes on and on, and on still more",
        min_delay=timedelta(milliseconds=50),
        paused=True,
    )
    await connection.execute("INSERT INTO egress (name) VALUES ('office')")
    await connection.execute(
        "INSERT INTO egress_service (egress, service_id, blocked_until, blocked_reason) "
        "VALUES ('office', 42, now(), 'INVALID_IP')"
    )

    await add_service(connection, 44, blocked_until=NOW, blocked_reason="SERVICE_DISABLED")

    shown = (await command("service", "list")).out

    for word in (
        "SERVICE_DISABLED",
        "Invoices",
        "1000 a day",
        "9000 a month",
        "50 ms apart",
        "paused",
        "blocked at",
    ):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80


async def test_list_as_json(command: Command, connection: Connection) -> None:
    """As JSON the list has every column, durations in seconds and times in UTC."""
    await add_service(connection, min_delay=timedelta(milliseconds=50), day_limit=3)
    await connection.execute(
        "UPDATE service SET blocked_until = '2030-01-01 12:00+02', blocked_reason = 'x'"
    )

    assert (await command("service", "list", "--json")).json == [
        {
            "service_id": SERVICE,
            "user_id": 7,
            "name": "",
            "day_limit": 3,
            "week_limit": None,
            "month_limit": None,
            "min_delay": 0.05,
            "timezone": "Europe/Sofia",
            "patterns": None,
            "on_unknown": "hold",
            "paused": False,
            "blocked_until": "2030-01-01T10:00:00Z",
            "blocked_reason": "x",
            "blocked_egresses": [],
        }
    ]


async def test_empty_list(command: Command) -> None:
    """Where there is no service, the list says how to add one."""
    assert "dispatcher service add --help" in (await command("service", "list")).out
    assert (await command("service", "list", "--json")).json == []


@pytest.mark.parametrize("verb", ["add", "set", "pause", "resume"])
async def test_json_of_a_change(command: Command, connection: Connection, verb: str) -> None:
    """With --json a change prints the service's number."""
    if verb != "add":
        await add_service(connection)
    options = ["--user-id", 7] if verb in {"add", "set"} else []

    done = await command("service", verb, SERVICE, *options, "--json")

    assert done.json == {"service_id": SERVICE}
