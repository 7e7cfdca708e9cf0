"""What all commands have in common: help, exit codes, and no traceback for what can be foreseen."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from dispatcher import __version__
from dispatcher.cli import _COMMANDS
from tests.builders import NUMBER, SERVICE, TEXT, add_service
from tests.integration.commands.conftest import Command
from tests.integration.peers import Connection, wait_for

SERVICE_COMMANDS = ("add", "set", "list", "pause", "resume")


def every_command() -> list[tuple[str, ...]]:
    """All that has a --help."""
    return [
        (),
        *((name,) for name in _COMMANDS),
        *(("service", name) for name in SERVICE_COMMANDS),
    ]


@pytest.mark.parametrize("name", every_command(), ids=" ".join)
async def test_help(offline: Command, name: tuple[str, ...]) -> None:
    """Each command has a help of at most 80 columns, with an example."""
    done = await offline(*name, "--help")

    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\b" not in done.out
    if name not in {(), ("service",)}:
        assert f"dispatcher {' '.join(name)}" in done.out.partition("\n")[2]


async def test_all_are_listed(offline: Command) -> None:
    """The list of commands names each of them on a line of its own."""
    lines = (await offline("--help")).out.splitlines()

    for name in _COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(".")


async def test_version(process: Command) -> None:
    """The version is told without a database."""
    done = await process("--version", DATABASE_URL="nonsense")

    assert (done.code, done.out, done.err) == (0, f"dispatcher {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("enqueue",),
        ("why", "me"),
        ("why",),
        ("prune",),
        ("service",),
        ("service", "nothing"),
        ("service", "add", "-1", "--user-id", "7"),
        ("status", "--loud"),
        ("enqueue", "--service", "42", "--priority", "40000"),
    ],
)
async def test_wrong_use(offline: Command, arguments: tuple[str, ...]) -> None:
    """Wrong use ends with exit code 2 and says why on standard error."""
    done = await offline(*arguments)

    assert done.code == 2
    assert done.err != ""
    assert "Traceback" not in done.err


async def test_wrong_setting(process: Command) -> None:
    """A wrong setting ends any command with exit code 2 and one sentence that names it."""
    done = await process("status", DISPATCHER_LEASE="long")

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("DISPATCHER_LEASE is wrong: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (("service", "list"), "postgresql://me:secret@127.0.0.1:{port}/x"),
        (("migrate",), "postgresql://me:secret@127.0.0.1:{port}/x"),
        (("migrate", "--check"), "postgresql://me:secret@nowhere.invalid/x"),
        (("status", "--json"), "postgresql:///x?host=/nowhere"),
    ],
)
async def test_database_away(process: Command, arguments: tuple[str, ...], url: str) -> None:
    """Without its database a command ends with exit code 1 and one sentence without secrets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    done = await process(*arguments, DATABASE_URL=url.format(port=port))

    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("The database cannot be used (")
    assert done.err.endswith("): check DATABASE_URL, and that it runs.\n")
    assert done.err.count("\n") == 1
    assert "secret" not in done.err


async def test_unknown_database(process: Command, database: str) -> None:
    """A database that the server does not have is told in one sentence."""
    done = await process("status", DATABASE_URL=database.replace("/test_", "/not_"))

    assert done.code == 1
    assert "does not exist" in done.err
    assert done.err.count("\n") == 1


async def test_embedded_in_the_way(process: Command, settings: Path) -> None:
    """An embedded database that cannot be made ends a command with one sentence."""
    (settings / "file").touch()

    done = await process("status", DATABASE_URL="", DISPATCHER_DATA_DIR=str(settings / "file"))

    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("The embedded PostgreSQL cannot use ")
    assert done.err.count("\n") == 1


async def test_least_rights(
    command: Command, connection: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a role may not do is told in one sentence, without the row."""
    await add_service(connection)
    role = f"reader_{os.getpid()}"
    await connection.execute(
        f"CREATE ROLE {role} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"
    )
    monkeypatch.setenv("DATABASE_URL", database.replace("postgres@", f"{role}@"))
    try:
        assert (await command("status")).code == 0
        done = await command("enqueue", "--service", SERVICE, "--msisdn", NUMBER, "--text", TEXT)
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")

    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "The database does not allow it (permission denied for table outbox): use a role that "
        "may.\n"
    )


async def test_interrupted(connection: Connection, settings: Path) -> None:
    """Ctrl-C ends a command without a word, with the exit code that shells expect."""
    await connection.execute("BEGIN; LOCK TABLE service")
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "service", "list"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    waits = "SELECT 1 FROM pg_locks WHERE relation = 'service'::regclass AND NOT granted"
    await wait_for(lambda: connection.fetchval(waits), "the command waits")
    running.send_signal(signal.SIGINT)

    said, _ = await running.communicate()

    assert (running.returncode, said) == (130, b"")


async def test_what_nobody_foresaw(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw is not hidden behind a sentence."""
    monkeypatch.setattr("dispatcher.commands.service.load", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        await command("service", "list")
