from datetime import UTC, datetime, timedelta

import pytest

from dispatcher.db.prune import STEP
from tests.builders import NUMBER, SERVICE, add_message, add_service
from tests.integration.commands.conftest import Command, rows
from tests.integration.peers import Connection, statuses

OLD = datetime.now(UTC) - timedelta(days=100)
FINISHED = (
    "accepted",
    "enroute",
    "delivered",
    "undeliverable",
    "rejected",
    "expired",
    "cancelled",
)


async def test_what_is_finished_and_old(command: Command, connection: Connection) -> None:
    """Finished messages go when they are old; what waits or is in doubt stays, however old."""
    await add_service(connection)
    for status in (*FINISHED, "pending", "unknown"):
        await add_message(connection, status=status, status_at=OLD)
        await add_message(connection, status=status)
    await add_message(connection, status="sending", status_at=OLD, worker_id=1, claimed_at=OLD)

    done = await command("prune", "--older-than", "90d")

    assert (done.code, done.out) == (0, f"{len(FINISHED)} messages removed.\n")
    assert await statuses(connection) == dict.fromkeys(FINISHED, 1) | {
        "pending": 2,
        "unknown": 2,
        "sending": 1,
    }


async def test_all_that_belongs_to_a_message(command: Command, connection: Connection) -> None:
    """A message takes its attempts and reports with it, and nobody else's."""
    await add_service(connection)
    old = await add_message(connection, status="delivered", status_at=OLD)
    new = await add_message(connection, status="delivered")
    for number in (old, new):
        await connection.execute(
            "INSERT INTO attempt (message_id, claim_no, worker_id, sent_at, seconds, outcome) "
            "VALUES ($1, 1, 1, now(), 0.1, 'accepted'), ($1, 2, 1, now(), 0.1, 'accepted')",
            number,
        )
        await connection.execute(
            "INSERT INTO delivery_report (provider_id, message_id) VALUES ('x', $1)", number
        )

    await command("prune", "--older-than", "90d")

    assert await rows(connection, "SELECT DISTINCT message_id FROM attempt") == [(new,)]
    assert await rows(connection, "SELECT message_id FROM delivery_report") == [(new,)]


async def test_reports_windows_and_workers(command: Command, connection: Connection) -> None:
    """Reports on no message, windows long ended and workers long gone are removed too."""
    await add_service(connection)
    await connection.execute(
        "INSERT INTO delivery_report (provider_id, received_at) VALUES ('old', $1), ('new', now())",
        OLD,
    )
    await connection.execute(
        "INSERT INTO quota_usage (service_id, period, window_start) VALUES "
        "(42, 'month', $1), (42, 'day', now()), (42, 'month', now() - interval '100 d')",
        OLD - timedelta(days=100),
    )
    await connection.execute("INSERT INTO egress (name) VALUES ('e')")
    await connection.execute(
        "INSERT INTO worker (id, egress, host, pid, version, lease, lease_until) VALUES "
        "(1, 'e', 'gone', 1, '0', '1 s', $1), (2, 'e', 'holds', 1, '0', '1 s', $1), "
        "(3, 'e', 'alive', 1, '0', '1 s', now())",
        OLD,
    )
    await add_message(connection, status="sending", worker_id=2, claimed_at=OLD)

    done = await command("prune", "--older-than", "90d", "--json")

    assert done.json == {
        "messages": 0,
        "kept_for_dedup_key": 0,
        "reports": 1,
        "quota_windows": 1,
        "workers": 1,
    }
    assert await rows(connection, "SELECT provider_id FROM delivery_report") == [("new",)]
    assert await rows(connection, "SELECT count(*) FROM quota_usage") == [(2,)]
    assert await rows(connection, "SELECT id FROM worker ORDER BY id") == [(2,), (3,)]


async def test_keys_are_kept(command: Command, connection: Connection) -> None:
    """A key that is younger than asked for keeps its message, and all that belongs to it."""
    await add_service(connection)
    ended = {"status": "delivered", "status_at": OLD}
    young = await add_message(connection, dedup_key="young", created_at=OLD, **ended)
    await add_message(connection, dedup_key="old", created_at=OLD - timedelta(days=300), **ended)
    await add_message(connection, created_at=OLD, **ended)

    done = await command("prune", "--older-than", "90d", "--keep-dedup", "365d")

    assert done.out == "2 messages removed.\n1 message kept for their dedup_key.\n"
    assert await rows(connection, "SELECT id FROM outbox") == [(young,)]
    assert (await command("prune", "--older-than", "90d")).out == "1 message removed.\n"


async def test_many_steps(command: Command, connection: Connection) -> None:
    """Any number of messages is gone through, also where ids are far apart."""
    await add_service(connection)
    await connection.execute(
        "INSERT INTO outbox (id, service_id, msisdn, text, status, status_at) "
        "SELECT n * n, $1, $2, 'Hi', CASE WHEN n % 2 = 0 THEN 'delivered' ELSE 'pending' END, $3 "
        "FROM generate_series(1, $4) n",
        SERVICE,
        NUMBER,
        OLD,
        2 * STEP + 10,
    )

    done = await command("prune", "--older-than", "90d")

    assert done.out == f"{STEP + 5} messages removed.\n"
    assert await statuses(connection) == {"pending": STEP + 5}


async def test_nothing_there(command: Command) -> None:
    """An empty database needs no pruning."""
    assert (await command("prune", "--older-than", "90d")).out == "0 messages removed.\n"


@pytest.mark.parametrize("option", ["--older-than", "--keep-dedup"])
async def test_wrong_span(command: Command, option: str) -> None:
    """A span that cannot be read is named, and nothing is removed."""
    done = await command("prune", "--older-than", "90d", option, "long")

    assert done.code == 2
    assert done.err.startswith(f"{option} is wrong: it is no span of time")
