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
    path = spool.write(folder, worker.worker_id, entered, results)
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
