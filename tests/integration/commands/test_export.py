import asyncio
import csv
import io
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.builders import NUMBER, SERVICE, add_message, add_service
from tests.integration.commands.conftest import Command
from tests.integration.peers import Connection

HEADER = [
    "id",
    "msisdn",
    "status",
    "status_at",
    "attempts",
    "reply",
    "provider_id",
    "error",
    "batch",
    "dedup_key",
    "created_at",
    "accepted_at",
]
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


async def _batch(connection: Connection) -> None:
    await add_service(connection)
    await add_message(
        connection,
        batch="may",
        status="accepted",
        status_at=NOON,
        created_at=NOON,
        accepted_at=NOON,
        attempts=1,
        reply="MSG_OK:7",
        provider_id="7",
    )
    await add_message(connection, batch="june")
    await add_message(
        connection,
        batch="may",
        msisdn="0888, or so",
        status="rejected",
        status_at=NOON,
        created_at=NOON,
        error='It is not "a number".',
        dedup_key="k",
    )


async def test_csv(command: Command, connection: Connection) -> None:
    """A batch comes out as CSV, with whole numbers and times in UTC, and no other message."""
    await _batch(connection)

    done = await command("export", "--batch", "may")

    noon = "2026-11-22T12:00:00Z"
    assert done.code == 0
    assert list(csv.reader(io.StringIO(done.out))) == [
        HEADER,
        ["1", NUMBER, "accepted", noon, "1", "MSG_OK:7", "7", "", "may", "", noon, noon],
        [
            *("3", "0888, or so", "rejected", noon, "0", "", "", 'It is not "a number".'),
            *("may", "k", noon, ""),
        ],
    ]


async def test_json(command: Command, connection: Connection) -> None:
    """With --json the same comes as one document."""
    await _batch(connection)

    first, second = (await command("export", "--batch", "may", "--json")).json

    assert list(first) == HEADER
    assert (first["id"], first["accepted_at"]) == (1, "2026-11-22T12:00:00Z")
    assert (second["error"], second["accepted_at"]) == ('It is not "a number".', None)


async def test_into_a_file(command: Command, connection: Connection, settings: Path) -> None:
    """Written to a file, it leaves standard output alone."""
    await _batch(connection)
    printed = (await command("export", "--batch", "may")).out

    done = await command("export", "--batch", "may", "--output", "may.csv")

    assert (done.code, done.out, done.err) == (0, "", "2 messages written to may.csv.\n")
    assert (settings / "may.csv").read_text() == printed


async def test_unknown_batch(command: Command, settings: Path) -> None:
    """A batch that is not there is named, and no file appears."""
    done = await command("export", "--batch", "may", "--output", "may.csv")

    assert (done.code, done.err) == (1, "There is no message in the batch 'may'.\n")
    assert not (settings / "may.csv").exists()


async def test_file_that_cannot_be_written(command: Command, connection: Connection) -> None:
    """A file that cannot be written is told in one sentence."""
    await _batch(connection)

    done = await command("export", "--batch", "may", "--output", "nowhere/may.csv")

    assert (done.code, done.out) == (1, "")
    assert done.err == "nowhere/may.csv cannot be written (No such file or directory).\n"


async def test_reader_that_leaves(connection: Connection, settings: Path) -> None:
    """A reader that has seen enough, such as head, ends the command without a word."""
    await add_service(connection)
    await connection.execute(
        "INSERT INTO outbox (service_id, msisdn, text, batch) "
        "SELECT $1, $2, 'Hi', 'may' FROM generate_series(1, 20000)",
        SERVICE,
        NUMBER,
    )
    ours, theirs = os.pipe()
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "export", "--batch", "may"),
        stdout=theirs,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    os.close(theirs)
    await asyncio.to_thread(os.read, ours, 100)
    os.close(ours)

    _, said = await running.communicate()

    assert said == b""
