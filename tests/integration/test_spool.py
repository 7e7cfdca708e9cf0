"""What was spooled is taken up on a real PostgreSQL, once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from dispatcher import spool
from dispatcher.db import workers
from dispatcher.db.outbox import Result
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.domain.outcomes import doubt
from tests.builders import add_messages, add_service
from tests.integration.peers import Connection, Peer, midweek, peer, statuses, used


@pytest.fixture
async def worker(database: str, connection: Connection) -> AsyncIterator[Peer]:
    """A worker that has entered itself, and a service."""
    await add_service(connection, timezone=midweek())
    async with peer(database) as entered:
        yield entered


def files(folder: Path) -> list[Path]:
    """All that lies in a folder and below."""
    return [path for path in folder.rglob("*") if path.is_file()]


async def write(folder: Path, worker: Peer, *results: Result) -> Path:
    """Spool results as the worker would; returns the file."""
    entered = await workers.entered(worker.session, worker.worker_id)
    assert entered is not None
    database = await workers.database(worker.session)
    path = spool.write(folder, worker.worker_id, entered, results, database=database)
    assert path is not None
    return path


async def test_left_to_its_own_database(
    connection: Connection, worker: Peer, tmp_path: Path
) -> None:
    """What a worker of the same number spooled for another database is neither used nor removed."""
    await add_messages(connection, 1)
    rows = (await worker.claim()).sending
    await write(tmp_path, worker, worker.result(rows[0]))
    # As another database has it, in which the worker of this number entered at another time.
    await connection.execute("UPDATE worker SET started_at = started_at - interval '1 s'")

    with structlog.testing.capture_logs() as told:
        await spool.take_up(tmp_path, worker.session)

    assert [event["event"] for event in told] == ["spool.foreign"]
    assert await statuses(connection) == {"sending": 1}
    assert len(files(tmp_path)) == 1


async def test_worker_that_is_forgotten(
    connection: Connection, worker: Peer, other_database: str, tmp_path: Path
) -> None:
    """What a worker spooled that nobody knows any more is taken up by its own database alone."""
    await add_messages(connection, 1)
    rows = (await worker.claim()).sending
    await write(tmp_path, worker, worker.result(rows[0]))
    await connection.execute("DELETE FROM worker")

    async with Session(other_database, name="test", timeout=30) as other:
        with structlog.testing.capture_logs() as told:
            await spool.take_up(tmp_path, other)
    kept = len(files(tmp_path))
    await spool.take_up(tmp_path, worker.session)

    assert [event["event"] for event in told] == ["spool.foreign"]
    assert kept == 1
    assert await statuses(connection) == {"accepted": 1}
    assert files(tmp_path) == []


async def test_file_that_names_no_database(
    connection: Connection, worker: Peer, tmp_path: Path
) -> None:
    """A file of an earlier version is taken up, though its worker is forgotten."""
    await add_messages(connection, 1)
    rows = (await worker.claim()).sending
    path = await write(tmp_path, worker, worker.result(rows[0]))
    worker_id, entered, rest = path.name.split("-")
    path.rename(path.with_name(f"{worker_id}-{entered}-{rest.split('.')[-2]}.jsonl"))
    await connection.execute("DELETE FROM worker")

    await spool.take_up(tmp_path, worker.session)

    assert await statuses(connection) == {"accepted": 1}
    assert files(tmp_path) == []


async def test_outboxes_of_one_database(
    database: str, connection: Connection, worker: Peer
) -> None:
    """Two outboxes in one database, each in a schema of its own, are not taken for one."""
    await connection.execute("CREATE SCHEMA another")
    await connection.execute("CREATE TABLE another.worker (LIKE worker)")

    async with Session(f"{database}&search_path=another", name="test", timeout=30) as other:
        assert await workers.database(other) != await workers.database(worker.session)


async def test_taken_up_once(connection: Connection, worker: Peer, tmp_path: Path) -> None:
    """Spooled results are recorded as if they came now, and the file is gone after that."""
    await add_messages(connection, 4)
    rows = (await worker.claim()).sending
    await write(
        tmp_path,
        worker,
        worker.result(rows[0], b"MSG_OK:abc"),
        worker.result(rows[1], b"INVALID_MSISDN"),
        worker.result(rows[2], doubt("No answer came (reset).")),
    )
    with structlog.testing.capture_logs() as told:
        await spool.take_up(tmp_path, worker.session)
        await spool.take_up(tmp_path, worker.session)

    assert await statuses(connection) == {"accepted": 1, "rejected": 1, "unknown": 1, "sending": 1}
    assert await used(connection) == (3, 3, 3)
    assert [event["event"] for event in told if event["event"].startswith("spool")] == [
        "spool.taken_up"
    ]
    assert files(tmp_path) == []


async def test_nothing_spooled(worker: Peer, tmp_path: Path) -> None:
    """Without a spool there is nothing to take up."""
    await spool.take_up(tmp_path, worker.session)

    assert files(tmp_path) == []


async def test_already_recorded(connection: Connection, worker: Peer, tmp_path: Path) -> None:
    """What was recorded after all, before the worker knew it, changes nothing."""
    await add_messages(connection, 1)
    rows = (await worker.claim()).sending
    await worker.record(rows, b"MSG_OK:abc")
    before = await connection.fetch("SELECT * FROM outbox")
    await write(tmp_path, worker, worker.result(rows[0], b"MSG_OK:abc"))

    await spool.take_up(tmp_path, worker.session)

    assert await connection.fetch("SELECT * FROM outbox") == before


async def test_database_is_away(connection: Connection, worker: Peer, tmp_path: Path) -> None:
    """While the database is away the file stays."""
    await add_messages(connection, 1)
    rows = (await worker.claim()).sending
    path = await write(tmp_path, worker, worker.result(rows[0]))

    async with Session("postgresql://nobody@127.0.0.1:1/x", name="test", timeout=5) as away:
        with pytest.raises(DatabaseLost):
            await spool.take_up(tmp_path, away)

    assert files(tmp_path) == [path]
